"""Prompts to images with any network of a backbone: the teacher's guided ODE, or a student's few noisy hops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advdmd import flow
from advdmd.models.backbone import Backbone
from advdmd.models.networks import Teacher
from advdmd.rng import generator, to_default_device
from advdmd.rollout import rollout, sample_euler
from advdmd.transitions import cps
from advdmd.types import Cond


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How to sample: `eta` None is the ODE (a teacher, with `guidance`), else a student's noise share."""

    steps: int
    shift: float = 3.0
    guidance: float = 1.0
    eta: float | None = None
    gap: float | None = None  # TwinFlow's grid instead of the shifted one

    def __post_init__(self) -> None:
        assert len(self.grid) == self.steps + 1
        if self.eta is not None:
            cps(self.eta)
        if self.guidance < 1:
            raise ValueError(f"guidance={self.guidance}: must be at least 1, which turns it off")
        if self.eta is not None and self.guidance != 1:
            raise ValueError(f"guidance={self.guidance}: a few-step student has its guidance built in; leave it at 1")

    @property
    def grid(self) -> Tensor:
        """[steps + 1] times from noise to data."""
        return flow.grid(self.steps, self.shift) if self.gap is None else flow.twinflow_grid(self.steps, self.gap)

    @property
    def nfe(self) -> int:
        """Network evaluations per image; guidance costs two a step."""
        return self.steps * (2 if self.guidance > 1 else 1)


def draw_noise(keys: Sequence[object], shape: Sequence[int], hops: int) -> Tensor:
    """[hops, N, *shape]: every image has a stream of its own, so results do not depend on batches."""
    return to_default_device(
        torch.stack([torch.randn(hops, *shape, generator=generator("image", k), device="cpu") for k in keys], 1)
    )


@torch.no_grad()
def decode(backbone: Backbone, x0: Tensor) -> Tensor:
    """Latents to images where the autoencoder lives, which need not be where the transformer does."""
    return backbone.decode(x0.to(backbone.vae.device))


@torch.no_grad()
def encode_prompts(backbone: Backbone, prompts: Sequence[str], device: torch.device) -> Cond:
    """Prompts encoded where the text encoders live, for a pass on a device."""
    with torch.device("cpu"):
        ids = backbone.tokenize(prompts)
    with (where := next(backbone.encoders[0].parameters()).device):
        return backbone.embed(ids.to(where)).to(device)


@torch.no_grad()
def sample_latents(backbone: Backbone, net: nn.Module, cond: Cond, null: Cond, noise: Tensor, how: SamplerConfig) -> Tensor:
    """Latents [N, ...] of conditions [N] from noise [>= hops, N, ...] (the ODE uses the first); null [1] is for guidance."""
    velocity, grid = Teacher(backbone, how.guidance, null, net), how.grid.to(noise.device)
    if how.eta is None:
        return sample_euler(velocity, cond, noise[0], grid)
    return rollout(velocity, cond, noise, grid, cps(how.eta)).x[-1]


@torch.no_grad()
def sample(
    backbone: Backbone,
    net: nn.Module,
    prompts: Sequence[str],
    noise: Tensor,
    how: SamplerConfig,
    batch: int = 128,
    say: Callable[[int], object] | None = None,
) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1]; noise [>= hops, N, ...] as from `draw_noise` (the ODE uses the first)."""
    out, null = [], encode_prompts(backbone, [""], noise.device)
    for i in torch.arange(len(prompts)).split(batch):
        cond = encode_prompts(backbone, [prompts[int(k)] for k in i], noise.device)
        out.append(decode(backbone, sample_latents(backbone, net, cond, null, noise[:, i], how)))
        if say:
            say(int(i[-1]) + 1)
    return torch.cat(out)
