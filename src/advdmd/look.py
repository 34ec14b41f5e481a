"""Pictures to look at: prompts to bytes, rows of images as one sheet, the same prompts and noise over a run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from advdmd.evaluation.generate import Painter
from advdmd.files import write_image
from advdmd.models.sampler import Sampling, decode, draw_noise, sample, walk
from advdmd.types import Cond

LOOK_PROMPTS = (
    "a picture of a red circle",
    "a picture of three squares",
    "a picture of a blue triangle and a yellow cross",
    "a picture of a circle left of a square",
    "A small yellow square. A large blue circle. Square above circle. Black background.",
    "Two small red triangles. A small green cross. Triangles left of cross. White background.",
)


def to_bytes(images: Tensor) -> np.ndarray:
    """[N, 3, H, W] in [-1, 1] -> [N, H, W, 3] uint8."""
    return ((images.permute(0, 2, 3, 1).float().cpu().numpy() + 1) * 127.5 + 0.5).clip(0, 255).astype(np.uint8)


def painter(backbone: Any, net: torch.nn.Module, how: Sampling, say: Callable[[int], object] | None = None) -> Painter:
    """What evaluation calls to draw: prompts and keys to images."""

    def paint(prompts: Sequence[str], keys: Sequence[object]) -> np.ndarray:
        noise = draw_noise(keys, backbone.latent_shape, how.steps if how.eta is not None else 1)
        return to_bytes(sample(backbone, net, prompts, noise, how, say=say))

    return paint


def grid_image(rows: Sequence[np.ndarray], scale: int = 3) -> Image.Image:
    """Rows of images [n, H, W, 3] as one picture, enlarged without smoothing, with a thin gap."""
    gap = np.pad(np.stack(rows), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    r, n, h, w, c = gap.shape
    sheet = Image.fromarray(gap.transpose(0, 2, 1, 3, 4).reshape(r * h, n * w, c))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)


def watch(backbone: Any, net: torch.nn.Module, how: Sampling, cond: Cond, null: Cond, folder: Path, step: int) -> None:
    """samples/step-NNNNNN.png in a run's folder: three images of each condition, the same noise every time; one of a published
    model's, whose autoencoder works on the CPU, where it costs 2.5 TFLOP an image of 512 pixels and 10 of 1024."""
    small = backbone.pipe.vae_scale_factor * backbone.latent_shape[-1] < 128
    each = 3 if small else 1
    n = each * len(cond)
    noise = draw_noise([("look", k) for k in range(n)], backbone.latent_shape, how.steps)
    parts = torch.arange(n).split(each)  # few at a time, as they are drawn beside what learns
    drawn = [decode(backbone, walk(backbone, net, cond[i // each], null, noise[:, i], how)) for i in parts]
    images = to_bytes(torch.cat(drawn))
    (folder / "samples").mkdir(exist_ok=True)
    rows = [images] if n % 2 else [images[: n // 2], images[n // 2 :]]
    write_image(folder / "samples" / f"step-{step:06d}.png", grid_image(rows, 3 if small else 1))
