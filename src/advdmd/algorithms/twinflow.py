"""TwinFlow: one network and signed times instead of a fake score (arXiv 2512.05150; defaults of its repository).

At positive t the network follows the trajectory of data, at negative t the trajectory of its own images.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from advdmd import flow, losses
from advdmd.algorithms.base import Algorithm, Costs, ModelBuilder, TargetTimeVelocity, Trainable
from advdmd.models.sampler import SamplerConfig
from advdmd.rng import Rng
from advdmd.rollout import Velocity
from advdmd.types import Batch, Cond, StepMetrics, as_floats, moved

EPS = 0.01  # the step from t towards r over which the instantaneous velocity stands for the average one
QUARTERS = ("one_step", "near", "any_step", "fake_trajectory")


class TwinFlowModels(NamedTuple):
    """The student F(x, t, r, cond), the same with EMA weights, the teacher without guidance, and the empty prompt [1]."""

    student: Trainable
    ema: TargetTimeVelocity
    teacher: Velocity
    null: Cond


def barron_loss(error: Tensor, c: float = 1e-3) -> Tensor:
    """mse (mse / c^2 + 1)^(-1/2) / c with the factor detached (Barron's loss at alpha = 1), error [N, ...] -> [N]."""
    mse = losses.mean_flat(error.float().square())
    return mse * ((mse / c**2 + 1) ** -0.5 / c).detach()


def guidance_strength(scale: float) -> float:
    """The strength w of the enhanced target that amounts to guidance of `scale`: 1 - 1 / scale; 5 gives the paper's .8.

    The target v + w (F - F_null) is made with the network that learns it. At its fixed point F = v + w (F - F_null), which is
    v_null + (v - v_null) / (1 - w) if the empty prompt stays where it was. With w >= 1 there is no fixed point. With the
    teacher's (F - F_null) the target is plain guidance, and the strength is scale - 1.
    """
    return 1 - 1 / scale


@dataclass(frozen=True, kw_only=True)
class TwinFlow(Algorithm[TwinFlowModels]):
    """Hyperparameters of TwinFlow. Raises ValueError on values out of range."""

    steps: int = 2  # of the student's sampler
    last_time: float = 0.6  # of the student's grid before 0; .5 for 4 steps
    order: int = 2  # sub-steps of the integral
    # What makes targets: the student's EMA; the student as it is; or for guidance the teacher and for the integral the student.
    target_network: Literal["ema", "student", "teacher"] = "ema"
    guidance_strength: float = 0.8  # w of the enhanced target
    near_fraction: float = 0.05  # how far below t the targets of the second quarter are, at most, as a share of t
    rectification_weight: float = 0.5
    group_size: int = 4  # samples per prompt

    name: ClassVar[str] = "twinflow"
    starts_from_student: ClassVar[bool] = False  # its network also takes a target time
    supports_fsdp: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("steps", "order", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"TwinFlow({name}={getattr(self, name)}): must be at least 1")
        if not 0 < self.last_time < 0.999 or not 0 < self.near_fraction <= 1:
            raise ValueError(
                f"TwinFlow(last_time={self.last_time}, near_fraction={self.near_fraction}): last_time inside (0, .999), "
                "near_fraction inside (0, 1]"
            )
        if self.target_network not in ("ema", "student", "teacher"):
            raise ValueError(f"TwinFlow(target_network={self.target_network!r}): ema, student or teacher")
        if not 0 <= self.guidance_strength < (math.inf if self.target_network == "teacher" else 1):
            raise ValueError(
                f"TwinFlow(guidance_strength={self.guidance_strength}): lies in [0, 1), 1 - 1 / s for a guidance scale s; "
                "from 1 on the target diverges; with target_network=teacher at least 0, s - 1"
            )
        if self.rectification_weight < 0:
            raise ValueError(f"TwinFlow(rectification_weight={self.rectification_weight}): a weight cannot be negative")

    def train_step(self, models: TwinFlowModels, batch: Batch, iteration: int, rng: Rng) -> StepMetrics:
        """One TwinFlow iteration (arXiv 2512.05150).

        Each quarter of the batch learns another kind of step. one_step: from noise to the image. near: r just below t.
        any_step: any r below t. fake_trajectory: the trajectory of the student's own images, at negative times. Where the two
        trajectories disagree at the image of one step, the rectification moves that image towards the data trajectory.
        """
        (n, *shape), cond = batch.real_latents.shape, batch.cond
        t, r, quarter = self.sample_times(rng, n)
        e = rng.normal("z", shape)
        first, fourth = (slice(q, None, 4) for q in (0, 3))

        # 1. The fourth quarter's data are the student's own images, sampled in one step.
        x0 = batch.real_latents.clone()
        with torch.no_grad():
            e_fake = rng.normal("fake", shape)[fourth]
            one, zero = torch.ones_like(t[fourth]), torch.zeros_like(t[fourth])
            x0[fourth] = flow.x0_from_velocity(e_fake, models.student(e_fake, one, zero, cond[fourth]), one)
        x, v = flow.interpolate(x0, e, t.abs()), e - x0

        # 2. Every sample learns its average velocity from r to t.
        F = models.student(x, t, r, cond)
        target = self.target(models, F.detach(), x, t, r, v, cond, quarter)
        weight = torch.tan((1 - (t - r)) * math.pi / 2.5) + 1
        weight[fourth] = 1.0
        loss = weight * barron_loss(F - target)
        metrics: StepMetrics = {f"twinflow/{q}_loss": loss.detach()[i::4].mean() for i, q in enumerate(QUARTERS)}

        # 3. Rectification of the first quarter's images.
        if self.rectification_weight:
            rectification = self.rectification_weight * self.rectification_loss(models, x, t, F, cond, first, rng)
            weighted = len(QUARTERS) * rectification  # a mean over its quarter, as in TwinFlow's code
            loss = loss + torch.zeros_like(loss).slice_scatter(weighted, 0, 0, None, 4)
            metrics["twinflow/rectification_loss"] = rectification.detach().mean()
        return metrics | models.student.update([loss])

    def sample_times(self, rng: Rng, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Times t [N], target times r [N] and, on the host, quarter [N] in 0..3 of n samples; negative times for the fourth.

        Raises ValueError unless n is a multiple of 4.
        """
        if n % 4:
            raise ValueError(f"TwinFlow: {n} samples per rank do not make four quarters")
        u, share = rng.uniform("t"), rng.uniform("r")
        quarter = torch.arange(n) % 4
        of = moved(quarter, u.device)
        t = torch.where(of == 0, torch.ones_like(u), u.clamp(1e-3, 1 - 1e-3))
        distance = torch.where(of == 1, self.near_fraction * share, share)
        r = torch.where(of == 0, torch.zeros_like(u), t * (1 - distance))
        return torch.where(of == 3, -t, t), torch.where(of == 3, -t, r), quarter

    @torch.no_grad()
    def target(
        self, models: TwinFlowModels, F: Tensor, x: Tensor, t: Tensor, r: Tensor, v: Tensor, cond: Cond, quarter: Tensor
    ) -> Tensor:
        """What F(x, t, r) [N, ...] should be.

        The average velocity from r to t.

        (EPS v + integral from t - EPS to r) / (t - r): one short step along v [N, ...], the target network for the rest.
        Clipped to +-1 around F. The student's own samples have v itself, without a clip. quarter [N] lies on the host. Raises
        FloatingPointError if a target is not finite.
        """
        guided = ((quarter == 1) | (quarter == 2)).nonzero()[:, 0]
        if self.guidance_strength and len(guided):
            at = moved(guided, x.device)
            both, twice = cond[guided].with_null(models.null), at.repeat(2)
            conditional, null = self.instantaneous_velocity(models, x[twice], t[twice], both).chunk(2)
            v = v.index_add(0, at, self.guidance_strength * (conditional - null))
        data = (quarter < 3).nonzero()[:, 0]
        at = moved(data, x.device)
        start, end = (t[at] - EPS).maximum(r[at]), r[at]
        moves = self.integrate(models, x[at] - EPS * v[at], start, end, cond[data])
        integral = torch.zeros_like(x).index_copy(0, at, moves)
        short = t < r + EPS
        a = torch.where(short, torch.ones_like(t), (t - r) / EPS)
        b = torch.where(short, torch.zeros_like(t), torch.full_like(t, 1 / EPS))  # nothing is left to integrate
        error = flow.bcast(a, x) * F - flow.bcast(b, x) * integral - v
        if not as_floats(error.isfinite().all()[None])[0]:  # which clipping would hide
            raise FloatingPointError("student: a target is not finite")
        return torch.where(flow.bcast(moved(quarter == 3, x.device), x), v, F - error.clamp(-1, 1))

    def instantaneous_velocity(self, models: TwinFlowModels, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The velocity at x [N, ...] and t [N] by which targets are guided. -> [N, ...]"""
        if self.target_network == "teacher":
            return models.teacher(x, t, cond)
        return self.average_velocity(models, x, t, t, cond)

    def average_velocity(self, models: TwinFlowModels, x: Tensor, t: Tensor, r: Tensor, cond: Cond) -> Tensor:
        """The average velocity from r [N] to t [N] of which integrals are made. -> [N, ...]"""
        return models.ema(x, t, r, cond) if self.target_network == "ema" else models.student(x, t, r, cond)

    def integrate(self, models: TwinFlowModels, x: Tensor, t: Tensor, r: Tensor, cond: Cond) -> Tensor:
        """The target network's displacement [N, ...] from t [N] down to r [N], in `order` sub-steps of equal length."""
        dt, total = (t - r) / self.order, torch.zeros_like(x)
        for _ in range(self.order):
            move = flow.bcast(dt, x) * self.average_velocity(models, x, t, t - dt, cond)
            x, total, t = x - move, total + move, t - dt
        return total

    def rectification_loss(
        self, models: TwinFlowModels, x: Tensor, t: Tensor, F: Tensor, cond: Cond, i: slice, rng: Rng
    ) -> Tensor:
        """Moves the one-step images of samples i [n] by the difference of the two trajectories' velocities there. -> [n]"""
        x0, e = flow.x0_from_velocity(x[i], F[i].detach(), t[i]), rng.normal("again", x.shape[1:])[i]
        u = rng.uniform("again.t")[i].clamp(1e-3, 1 - 1e-3)
        x_u = flow.interpolate(x0, e, u)
        with torch.no_grad():
            s = torch.cat([-u, u])
            fake, real = models.student(torch.cat([x_u, x_u]), s, s, Cond.cat([cond[i], cond[i]])).chunk(2)
        g = (fake - real).clamp(-1, 1)
        return barron_loss(F[i] - (F[i].detach() - g))

    def build(self, builder: ModelBuilder) -> TwinFlowModels:
        """A student that takes a target time, its EMA, and the teacher."""
        student, ema = builder.target_time_student()
        return TwinFlowModels(student, ema, builder.teacher(), builder.null)

    def sampler(self) -> SamplerConfig:
        """TwinFlow's own grid; full re-noising."""
        return SamplerConfig(steps=self.steps, eta=1.0, last_time=self.last_time)

    def check_batch(self, prompts: int, world_size: int) -> None:
        """Raises ValueError if a rank's samples do not make four quarters."""
        super().check_batch(prompts, world_size)
        samples = prompts * self.group_size
        if samples // world_size % 4:
            raise ValueError(
                f"{samples} samples an iteration are {samples // world_size} in each of {world_size} processes: TwinFlow needs "
                "four equal quarters in each; set prompts_per_step or algorithm.group_size"
            )

    def forwards_per_sample(self, iteration: int, costs: Costs) -> dict[str, float]:
        """Forward passes per sample of any iteration by part; passes of a quarter of the batch count as a quarter."""
        return {
            "student": 1 + costs.backward,
            "own images": 0.25,
            "guidance": (self.guidance_strength > 0) * 2 * 0.5,
            "integral": 0.75 * self.order,
            "rectification": (self.rectification_weight > 0) * 2 * 0.25,
        }
