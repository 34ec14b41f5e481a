"""Sample grids while training: the same prompts and noise every time."""

from pathlib import Path
from typing import Any

import torch

from advdmd.files import write_image
from advdmd.models.images import image_grid, to_uint8
from advdmd.models.sampler import SamplerConfig, decode, draw_noise, sample_latents
from advdmd.types import Cond


def save_sample_grid(
    backbone: Any, net: torch.nn.Module, how: SamplerConfig, cond: Cond, null: Cond, folder: Path, step: int
) -> None:
    """samples/step-NNNNNN.png in a run's folder: three images of each condition, the same noise every time; one of a published
    model's, whose autoencoder works on the CPU, where it costs 2.5 TFLOP an image of 512 pixels and 10 of 1024."""
    small = backbone.pipe.vae_scale_factor * backbone.latent_shape[-1] < 128
    each = 3 if small else 1
    n = each * len(cond)
    noise = draw_noise([("look", k) for k in range(n)], backbone.latent_shape, how.steps)
    parts = torch.arange(n).split(each)  # few at a time, as they are drawn beside what learns
    drawn = [decode(backbone, sample_latents(backbone, net, cond[i // each], null, noise[:, i], how)) for i in parts]
    images = to_uint8(torch.cat(drawn))
    (folder / "samples").mkdir(exist_ok=True)
    rows = [images] if n % 2 else [images[: n // 2], images[n // 2 :]]
    write_image(folder / "samples" / f"step-{step:06d}.png", image_grid(rows, 3 if small else 1))
