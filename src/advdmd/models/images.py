"""Pictures: tensors to bytes, prompts to bytes, rows of images as one picture."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from torch import Tensor, nn

from advdmd.models.backbone import Backbone
from advdmd.models.sampler import SamplerConfig, draw_noise, sample
from advdmd.types import Cond, Prompt

LATENTS_PER_PASS = 2**19  # latent numbers: 2 images of 1024 pixels, 8 of 512, 128 of the miniature
ImageSampler = Callable[[Sequence[Prompt], Sequence[object]], np.ndarray]  # (prompts, keys of noise) -> [N, H, W, 3] uint8


def to_uint8(images: Tensor) -> np.ndarray:
    """[N, 3, H, W] in [-1, 1] -> [N, H, W, 3] uint8."""
    return ((images.permute(0, 2, 3, 1).float().cpu().numpy() + 1) * 127.5 + 0.5).clip(0, 255).astype(np.uint8)


def image_sampler(
    backbone: Backbone,
    net: nn.Module,
    sampler: SamplerConfig,
    progress: Callable[[int], object] | None = None,
    encode: Callable[[Sequence[Prompt]], Cond] | None = None,
) -> ImageSampler:
    """A function from prompts and keys of noise to images, with a network of the backbone, on the network's device.

    progress, encode: as in `sampler.sample`.
    """
    batch = max(1, min(128, LATENTS_PER_PASS // math.prod(backbone.latent_shape)))

    def generate(prompts: Sequence[Prompt], keys: Sequence[object]) -> np.ndarray:
        noise = draw_noise(keys, backbone.latent_shape, sampler.steps if sampler.eta is not None else 1)
        return to_uint8(sample(backbone, net, prompts, noise.to(backbone.device), sampler, batch, progress, encode))

    return generate


def image_grid(rows: Sequence[np.ndarray], scale: int = 3, gap: int = 255) -> Image.Image:
    """Rows of images [n, H, W, 3 or 4] uint8 as one picture, enlarged without smoothing; gaps are two pixels of value `gap`."""
    framed = np.pad(np.stack(rows), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=gap)
    r, n, h, w, c = framed.shape
    sheet = Image.fromarray(framed.transpose(0, 2, 1, 3, 4).reshape(r * h, n * w, c))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
