"""Prompts to images with any network of a backbone: a teacher's guided ODE, or a student's few stochastic steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from advdmd import flow
from advdmd.models.backbone import Backbone
from advdmd.models.networks import Teacher
from advdmd.rng import generator
from advdmd.rollout import rollout, sample_euler
from advdmd.transitions import cps
from advdmd.types import Cond, Edit, Json, Prompt, micro_batches


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a model is sampled: `eta` None is the ODE (a teacher, with `guidance_scale`), else the noise share of a student's
    steps.

    steps in [1, 1000]; shift > 0, or None for a teacher on the grid of its pipeline's scheduler; guidance_scale >= 1, 1 turns
    guidance off; eta in [0, 1]; last_time in (0, .999): TwinFlow's grid instead of the shifted one. Raises ValueError on values
    out of range, and on guidance for a student.
    """

    steps: int
    shift: float | None = 3.0
    guidance_scale: float = 1.0
    eta: float | None = None
    last_time: float | None = None

    def __post_init__(self) -> None:
        if self.shift is None and (self.eta is not None or self.last_time is not None):
            raise ValueError("shift=None: a student has a grid of its own, with its time shift")
        if self.last_time is not None:
            flow.twinflow_grid(self.steps, self.last_time)
        flow.grid(self.steps, 1.0 if self.shift is None else self.shift)
        if self.eta is not None:
            cps(self.eta)
        if self.guidance_scale < 1:
            raise ValueError(f"guidance_scale={self.guidance_scale}: must be at least 1, which turns it off")
        if self.eta is not None and self.guidance_scale != 1:
            raise ValueError(
                f"guidance_scale={self.guidance_scale}: a few-step student has its guidance built in; leave it at 1"
            )

    def grid(self, backbone: Backbone, device: torch.device | str = "cpu") -> Tensor:
        """Times [steps + 1] from noise to data."""
        if self.last_time is not None:
            return flow.twinflow_grid(self.steps, self.last_time, device)
        if self.shift is None:
            return backbone.scheduler_grid(self.steps).to(device)
        return flow.grid(self.steps, self.shift, device)

    @property
    def nfe(self) -> int:
        """Network evaluations per image; guidance costs two per step."""
        return self.steps * (2 if self.guidance_scale > 1 else 1)

    @property
    def stock(self) -> bool:
        """Whether stock schedulers can sample so: they re-noise fully, on the shifted grid."""
        return self.eta == 1 and self.last_time is None

    def changed(self, steps: int | None, guidance_scale: float | None) -> "SamplerConfig":
        """The same with other steps or guidance where they are not None. Raises ValueError on values out of range."""
        changes = {"steps": steps, "guidance_scale": guidance_scale}
        return replace(self, **{k: v for k, v in changes.items() if v is not None})

    def to_json(self) -> Json:
        """As it is written beside pipelines and images: a file format, whose keys do not change."""
        names = {"guidance_scale": "guidance", "last_time": "gap"}
        return {names.get(k, k): v for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, record: Json) -> "SamplerConfig":
        """Inverse of `to_json`; what is not there has its default. Raises ValueError on unknown keys and bad values."""
        names = {"guidance": "guidance_scale", "gap": "last_time"}
        try:
            return cls(**{names.get(k, k): v for k, v in record.items()})
        except TypeError as e:
            raise ValueError(str(e)) from None


def draw_noise(keys: Sequence[object], shape: Sequence[int], num_steps: int) -> Tensor:
    """Standard normal noise [num_steps, N, *shape], on the CPU.

    Every image has a stream of its own, so results do not depend on batches.
    """
    return torch.stack([torch.randn(num_steps, *shape, generator=generator("image", k)) for k in keys], 1)


@torch.no_grad()
def decode(backbone: Backbone, x0: Tensor) -> Tensor:
    """Latents [N, C, H, W] to images [N, 3, H', W'] in [-1, 1], on the autoencoder's device, which may be another than the
    transformer's.
    """
    return backbone.decode(x0.to(backbone.vae.device))


@torch.no_grad()
def encode_prompts(backbone: Backbone, prompts: Sequence[Prompt], device: torch.device | str) -> Cond:
    """N prompts, all texts or all edits, encoded on the text encoders' device; the conditions [N] on `device`."""
    encoders = next(backbone.encoders[0].parameters()).device
    if edits := [p for p in prompts if isinstance(p, Edit)]:
        sides = (backbone.pipe.vae_scale_factor * n for n in backbone.latent_shape[-2:])
        return backbone.encode_edits(edits, *sides).to(device)
    return backbone.encode_text(backbone.tokenize([str(p) for p in prompts]).to(encoders)).to(device)


@torch.no_grad()
def sample_latents(backbone: Backbone, net: nn.Module, cond: Cond, null: Cond, noise: Tensor, sampler: SamplerConfig) -> Tensor:
    """Latents [N, ...] of conditions [N] from noise [>= steps, N, ...], of which the ODE uses the first.

    null [1]: the empty prompt, for guidance; unused where conditions have their own.
    """
    velocity, grid = Teacher(backbone, sampler.guidance_scale, null, net), sampler.grid(backbone, noise.device)
    if sampler.eta is None:
        return sample_euler(velocity, cond, noise[0], grid)
    return rollout(velocity, cond, noise, grid, cps(sampler.eta)).x[-1]


@torch.no_grad()
def sample(
    backbone: Backbone,
    net: nn.Module,
    prompts: Sequence[Prompt],
    noise: Tensor,
    sampler: SamplerConfig,
    batch: int = 128,
    progress: Callable[[int], object] | None = None,
    encode: Callable[[Sequence[Prompt]], Cond] | None = None,
) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1] of N prompts. Raises ValueError on prompts without source images for a model of edits.

    noise [>= steps, N, ...]: as of `draw_noise`, of which the ODE uses the first.

    batch: prompts per pass. progress is called with the number of images that are done. encode: conditions of prompts and of
    the empty one, by default from the text encoders.
    """
    if backbone.edits and any(isinstance(p, str) for p in prompts):
        raise ValueError(f"a {type(backbone.pipe).__name__} edits images: give a source image with each prompt (--source)")
    encode = encode or (lambda texts: encode_prompts(backbone, texts, noise.device))
    out, null = [], None if backbone.edits else encode([backbone.null_prompt])  # an edit's condition holds its own
    counts = {len(p.sources) for p in prompts if isinstance(p, Edit)}  # conditions of one pass have as many source images
    for i in micro_batches(len(prompts), 1 if len(counts) > 1 else batch):
        cond = encode(prompts[i])
        out.append(decode(backbone, sample_latents(backbone, net, cond, cond if null is None else null, noise[:, i], sampler)))
        if progress:
            progress(i.stop)
    return torch.cat(out)
