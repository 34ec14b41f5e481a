"""How the miniature's teachers are made: an autoencoder, then flow matching with captions."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from advdmd import flow, losses
from advdmd.rng import Rng
from advdmd.types import Batch, Log


class Pupil(NamedTuple):
    """The one player of pre-training."""

    student: Any


def reconstruct(vae: Any, posterior: Any, pixels: Tensor, e: Tensor, kl_weight: float) -> Tensor:
    """[N] squared and absolute error of a noisy reconstruction, plus the KL to a unit Gaussian per latent number."""
    y = vae.decode(posterior.mean + posterior.std * e).sample
    error = losses.mean_flat((y - pixels).square()) + 0.1 * losses.mean_flat((y - pixels).abs())
    return error + kl_weight * posterior.kl().reshape(len(e), -1).sum(1) / e[0].numel()


@dataclass(frozen=True, kw_only=True)
class Autoencode:
    """Encoder and decoder together: reconstruct what was sampled from the posterior, stay near a unit Gaussian."""

    kl_weight: float = 3e-4

    def iteration(self, cast: Pupil, batch: Batch, step: int, rng: Rng) -> Log:
        vae, pixels = cast.student.net, batch.real
        posterior = vae.encode(pixels).latent_dist
        e = rng.normal("posterior", posterior.mean.shape[1:])
        return cast.student.descend([reconstruct(vae, posterior, pixels, e, self.kl_weight)])


@dataclass(frozen=True, kw_only=True)
class FlowMatch:
    """Flow matching with logit-normal times (SD3, 2403.03206, Sec. 3.1) and captions dropped for guidance."""

    drop: float = 0.1
    time_mean: float = 0.0
    time_std: float = 1.0

    def iteration(self, cast: Pupil, batch: Batch, step: int, rng: Rng) -> Log:
        x0, e = batch.real, rng.normal("e", batch.real.shape[1:])
        t = flow.logit_normal(rng.normal("t"), self.time_mean, self.time_std)
        keep = rng.uniform("drop") >= self.drop
        v = cast.student(flow.interpolate(x0, e, t), t, batch.cond, keep)
        return cast.student.descend([losses.velocity(v, x0, e)])
