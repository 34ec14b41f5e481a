"""Pictures to look at: prompts to bytes, rows of images as one sheet, the same prompts and noise over a run."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from advdmd.models.sampler import SamplerConfig, draw_noise, sample

ImageSampler = Callable[[Sequence[str], Sequence[object]], np.ndarray]  # (prompts, keys) -> [N, H, W, 3] uint8


def to_uint8(images: Tensor) -> np.ndarray:
    """[N, 3, H, W] in [-1, 1] -> [N, H, W, 3] uint8."""
    return ((images.permute(0, 2, 3, 1).float().cpu().numpy() + 1) * 127.5 + 0.5).clip(0, 255).astype(np.uint8)


def image_sampler(
    backbone: Any, net: torch.nn.Module, how: SamplerConfig, say: Callable[[int], object] | None = None
) -> ImageSampler:
    """What evaluation calls to draw: prompts and keys to images."""

    def paint(prompts: Sequence[str], keys: Sequence[object]) -> np.ndarray:
        noise = draw_noise(keys, backbone.latent_shape, how.steps if how.eta is not None else 1)
        return to_uint8(sample(backbone, net, prompts, noise, how, say=say))

    return paint


def image_grid(rows: Sequence[np.ndarray], scale: int = 3) -> Image.Image:
    """Rows of images [n, H, W, 3] as one picture, enlarged without smoothing, with a thin gap."""
    gap = np.pad(np.stack(rows), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    r, n, h, w, c = gap.shape
    sheet = Image.fromarray(gap.transpose(0, 2, 1, 3, 4).reshape(r * h, n * w, c))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
