"""TwinFlow: one network, signed times, no other score: positive t is the data's trajectory, negative t the student's own
(arXiv 2512.05150; defaults from its repository)."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advdmd import flow, losses
from advdmd.rng import Rng
from advdmd.types import Batch, Cond, Metrics, cat_conds

EPS = 0.01  # the step from t towards r over which the instantaneous velocity stands for the average one


class TwinFlowModels(NamedTuple):
    """The one player: its network F(x, t, r, c), the same with averaged weights, and the empty prompt."""

    student: Any
    average: Any
    null: Any


def barron_loss(error: Tensor, c: float = 1e-3) -> Tensor:
    """mse (mse / c^2 + 1)^(-1/2) / c with the factor detached (Barron's loss at alpha = 1). [N, ...] -> [N]"""
    mse = losses.mean_flat(error.float().square())
    return mse * ((mse / c**2 + 1) ** -0.5 / c).detach()


def guidance_strength(scale: float) -> float:
    """The strength w of the enhanced target that comes to guidance of `scale`: 1 - 1 / scale; 5 gives the paper's .8.

    The target v + w (F - F_null) is made with the network that learns it, so at rest F = v + w (F - F_null), which is
    v_null + (v - v_null) / (1 - w) while the empty prompt stays where it was. With w >= 1 there is no rest: scores fall to 0.
    """
    return 1 - 1 / scale


def expand_cond(cond: Any, n: int) -> Any:
    return cond[torch.zeros(n, dtype=torch.long)]


@dataclass(frozen=True, kw_only=True)
class TwinFlow:
    """Hyperparameters. `steps` and `gap` are the student's sampler; `order` the sub-steps of the integral; `guidance` the
    strength w of the enhanced target; `group` only deals batches."""

    steps: int = 2
    gap: float = 0.6  # .5 for 4 steps
    order: int = 2
    guidance: float = 0.8
    near: float = 0.05  # how far below t the targets of the second quarter lie, as a share of t
    rectify: float = 0.5
    group: int = 4

    def __post_init__(self) -> None:
        for name in ("steps", "order", "group"):
            if getattr(self, name) < 1:
                raise ValueError(f"TwinFlow({name}={getattr(self, name)}): must be at least 1")
        if not 0 < self.gap < 0.999 or not 0 < self.near <= 1:
            raise ValueError(f"TwinFlow(gap={self.gap}, near={self.near}): gap inside (0, .999), near inside (0, 1]")
        if not 0 <= self.guidance < 1:
            raise ValueError(
                f"TwinFlow(guidance={self.guidance}): the strength lies in [0, 1), 1 - 1 / s for a guidance scale s; from 1 on "
                "the target runs away from the network that makes it"
            )
        if self.rectify < 0:
            raise ValueError(f"TwinFlow(rectify={self.rectify}): a weight cannot be negative")

    def forwards(self, step: int, depth: float = 1.0, backward: float = 2.0, trunk: bool = False) -> dict[str, float]:
        """Forwards per sample by part (see AdvDMD.forwards): quarters of a batch count as quarters."""
        return {
            "student": 1 + backward,
            "fake": 0.25,
            "guidance": (self.guidance > 0) * 2 * 0.5,
            "integral": 0.75 * self.order,
            "rectify": (self.rectify > 0) * 2 * 0.25,
        }

    def times(self, rng: Rng, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """(t, r, quarter) of n samples: end to end, near, any, and the student's own at negative times."""
        if n % 4:
            raise ValueError(f"TwinFlow: {n} samples per rank do not make four quarters")
        quarter, u, share = torch.arange(n) % 4, rng.uniform("t"), rng.uniform("r")
        t = torch.where(quarter == 0, torch.ones(n), u.clamp(1e-3, 1 - 1e-3))
        far = torch.where(quarter == 1, self.near * share, share)
        r = torch.where(quarter == 0, torch.zeros(n), t * (1 - far))
        return torch.where(quarter == 3, -t, t), torch.where(quarter == 3, -t, r), quarter

    def iteration(self, cast: TwinFlowModels, batch: Batch, step: int, rng: Rng) -> Metrics:
        (N, *shape), cond = batch.real.shape, batch.cond
        t, r, quarter = self.times(rng, N)
        z, own, first = rng.normal("z", shape), (quarter == 3).nonzero()[:, 0], (quarter == 0).nonzero()[:, 0]

        # A quarter of the data are the student's own images, drawn in one step.
        x0 = batch.real.clone()
        with torch.no_grad():
            start = rng.normal("fake", shape)[own]
            one, zero = torch.ones(len(own)), torch.zeros(len(own))
            x0[own] = flow.x0_from_velocity(start, cast.student(start, one, zero, cond[own]), one)
        x, v = flow.interpolate(x0, z, t.abs()), z - x0

        F = cast.student(x, t, r, cond)
        target = self.target(cast, F.detach(), x, t, r, v, cond, quarter)
        weight = torch.where(quarter == 3, torch.ones(N), torch.tan((1 - (t - r)) * math.pi / 2.5) + 1)
        loss = weight * barron_loss(F - target)
        log: Metrics = {
            f"twin/{name}": loss.detach()[quarter == q].mean().item() for q, name in enumerate(("end", "near", "any", "own"))
        }

        # Where the two trajectories disagree at the image of one step, that image moves towards the data's.
        if self.rectify:
            seen, again = flow.x0_from_velocity(x[first], F[first].detach(), t[first]), rng.normal("again", shape)[first]
            u = rng.uniform("again.t")[first].clamp(1e-3, 1 - 1e-3)
            x_u = flow.interpolate(seen, again, u)
            with torch.no_grad():
                s = torch.cat([-u, u])
                theirs, ours = cast.student(torch.cat([x_u, x_u]), s, s, cond[first.repeat(2)]).chunk(2)
            g = (theirs - ours).clamp(-1, 1)
            extra = self.rectify * barron_loss(F[first] - (F[first].detach() - g))
            loss = loss.index_add(0, first, extra)
            log["twin/rectify"] = extra.detach().mean().item()
        return log | cast.student.descend([loss])

    @torch.no_grad()
    def target(
        self, cast: TwinFlowModels, F: Tensor, x: Tensor, t: Tensor, r: Tensor, v: Tensor, cond: Cond, quarter: Tensor
    ) -> Tensor:
        """What F(x, t, r) should be: the average velocity from r to t, by one short step along v and the averaged network
        for the rest, clipped to +-1 around F. The student's own samples and r = t keep v itself."""
        guided = ((quarter == 1) | (quarter == 2)).nonzero()[:, 0]
        if self.guidance and len(guided):
            twice = guided.repeat(2)
            both = cat_conds([cond[guided], expand_cond(cast.null, len(guided))])
            mine, null = cast.average(x[twice], t[twice], t[twice], both).chunk(2)
            v = v.index_add(0, guided, self.guidance * (mine - null))
        far = (quarter < 3).nonzero()[:, 0]
        integral = torch.zeros_like(x)
        integral[far] = self.integrate(cast, x[far] - EPS * v[far], (t[far] - EPS).maximum(r[far]), r[far], cond[far])
        short = t < r + EPS
        a = torch.where(short, torch.ones_like(t), (t - r) / EPS)
        b = torch.where(short, torch.zeros_like(t), torch.full_like(t, 1 / EPS))  # nothing is left to integrate
        away = flow.bcast(a, x) * F - flow.bcast(b, x) * integral - v
        if not away.isfinite().all():  # which clipping would hide
            raise FloatingPointError("student: a target is not finite")
        return F - away.clamp(-1, 1)

    def integrate(self, cast: TwinFlowModels, x: Tensor, t: Tensor, r: Tensor, cond: Cond) -> Tensor:
        """The averaged network's displacement from t down to r, in `order` sub-steps of equal length."""
        dt, total = (t - r) / self.order, torch.zeros_like(x)
        for _ in range(self.order):
            move = flow.bcast(dt, x) * cast.average(x, t, t - dt, cond)
            x, total, t = x - move, total + move, t - dt
        return total
