"""Sample grids while training: the same prompts and noise every time."""

from pathlib import Path

import torch
from torch import nn

from advdmd.files import write_image
from advdmd.models.backbone import Backbone
from advdmd.models.images import image_grid, to_uint8
from advdmd.models.sampler import SamplerConfig, decode, draw_noise, sample_latents
from advdmd.types import Cond, micro_batches


def save_sample_grid(
    backbone: Backbone, net: nn.Module, sampler: SamplerConfig, cond: Cond, null: Cond, folder: Path, iteration: int
) -> None:
    """Write samples/step-NNNNNN.png in a run's folder: three images of each condition [n], sampled with `net`.

    Of a published model one image each: its autoencoder works on the CPU, where it costs 2.5 TFLOP for an image of 512 pixels
    and 10 for one of 1024. null: the empty prompt [1].
    """
    small = backbone.pipe.vae_scale_factor * backbone.latent_shape[-1] < 128
    each = 3 if small else 1
    n = each * len(cond)
    noise = draw_noise([("look", k) for k in range(n)], backbone.latent_shape, sampler.steps).to(cond.embeds.device)
    conds, parts = cond[torch.arange(n) // each], micro_batches(n, each)  # few at a time: they are sampled beside what trains
    drawn = [decode(backbone, sample_latents(backbone, net, conds[i], null, noise[:, i], sampler)) for i in parts]
    images = to_uint8(torch.cat(drawn))
    (folder / "samples").mkdir(exist_ok=True)
    rows = [images] if n % 2 else [images[: n // 2], images[n // 2 :]]
    write_image(folder / "samples" / f"step-{iteration:06d}.png", image_grid(rows, 3 if small else 1))
