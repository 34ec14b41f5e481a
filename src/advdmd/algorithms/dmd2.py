"""DMD2: distribution matching, a GAN back-propagated into the student, backward simulation (arXiv 2405.14867)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advdmd import flow, losses
from advdmd.algorithms.base import Algorithm, Costs, DistillationModels, MicroBatches, ModelBuilder
from advdmd.algorithms.objectives import DiscriminatorInputs
from advdmd.algorithms.updates import logit_gap, update_auc, update_fake_score, update_student
from advdmd.models.sampler import SamplerConfig
from advdmd.rng import Rng
from advdmd.rollout import Trajectory, rollout
from advdmd.transitions import renoise
from advdmd.types import Batch, StepMetrics


@dataclass(frozen=True, kw_only=True)
class DMD2(MicroBatches, Algorithm[DistillationModels]):
    """Hyperparameters of DMD2; with gan_loss_weight = 0 it is DMD alone on backward-simulated inputs.

    Raises ValueError on values out of range.
    """

    steps: int = 4  # K
    shift: float = 3.0  # time shift of the student's grid
    group_size: int = 8  # samples per prompt
    fake_score_updates: int = 5  # optimizer steps of fake score and discriminator per rollout (two time-scale update rule)
    warmup_iterations: int = 0  # at first, without updates of the student: for one that is a few-step model already
    dm_every: int = 1  # iterations per rollout with student updates; DMD2's own schedule is 5 here, fake_score_updates = 1
    dm_updates: int = 1  # optimizer steps of the student per rollout, where they are due
    gan_loss_weight: float = 5e-3  # of the generator's GAN loss
    renoise_range: tuple[float, float] = (0.02, 0.98)  # noise levels of all losses
    auc_decay: float = 0.9  # of the running AUC

    name: ClassVar[str] = "dmd2"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "group_size", "fake_score_updates", "dm_every", "dm_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"DMD2({name}={getattr(self, name)}): must be at least 1")
        flow.grid(self.steps, self.shift)
        if not 0 <= self.auc_decay < 1:
            raise ValueError(f"DMD2(auc_decay={self.auc_decay}): lies in [0, 1)")
        if self.warmup_iterations < 0:
            raise ValueError(f"DMD2(warmup_iterations={self.warmup_iterations}): a count of iterations cannot be negative")
        if self.gan_loss_weight < 0:
            raise ValueError(f"DMD2(gan_loss_weight={self.gan_loss_weight}): a weight cannot be negative; 0 turns the GAN off")
        low, high = self.renoise_range
        if not 0 < low < high < 1:
            raise ValueError(f"DMD2(renoise_range={self.renoise_range}): needs 0 < low < high < 1")

    def train_step(self, models: DistillationModels, batch: Batch, iteration: int, rng: Rng) -> StepMetrics:
        """One DMD2 iteration (arXiv 2405.14867).

        One rollout (backward simulation), then updates of fake score and discriminator and, where due, of the student.
        """
        _, *shape = batch.real_latents.shape
        noise = rng.normal("rollout", (self.steps, *shape)).transpose(0, 1)
        grid = flow.grid(self.steps, self.shift, noise.device)
        trajectory = rollout(models.student, batch.cond, noise, grid, renoise, self.samples_of_a_pass)

        # 1. Fake score and discriminator follow the student.
        metrics, logits = update_fake_score(
            models,
            trajectory,
            batch.cond,
            rng,
            self.discriminator_inputs(trajectory, batch, rng) if self.gan_loss_weight else None,
            updates=self.fake_score_updates,
            micro_batch_size=self.samples_of_a_pass,
            renoise_range=self.renoise_range,
        )
        metrics["student/within_group_std"] = losses.within_group_std(trajectory.x[-1], self.group_size)
        if logits:
            real, fake = models.ranks.gather(logits["real_logit"]), models.ranks.gather(logits["fake_logit"])
            every = torch.ones_like(real, dtype=torch.bool)
            for k in range(1, self.steps + 1):  # all entries move alike: DMD2's discriminator sees all levels at once
                metrics["discriminator/auc"] = update_auc(models, real, fake, every, k, self.auc_decay)
            metrics["discriminator/logit_gap"] = logit_gap(real, fake, every)
        if not self.updates_student(iteration):
            return metrics
        # 2. Distribution matching and GAN through one step of the trajectory, both at the same noise level.
        return metrics | update_student(
            models,
            trajectory,
            batch.cond,
            rng,
            updates=self.dm_updates,
            micro_batch_size=self.samples_of_a_pass,
            renoise_range=self.renoise_range,
            gan_loss_weight=self.gan_loss_weight,
            gan_levels=lambda name, k, u: u,
        )

    def updates_student(self, iteration: int) -> bool:
        """Whether iteration 0, 1, ... ends with updates of the student: the last of each `dm_every`, after the warm-up."""
        return iteration >= self.warmup_iterations and (iteration + 1) % self.dm_every == 0

    def discriminator_inputs(self, trajectory: Trajectory, batch: Batch, rng: Rng) -> DiscriminatorInputs:
        """What the discriminator is shown.

        Predictions at a random step, re-noised to a random level, and real images at that level.
        """
        shape = batch.real_latents.shape[1:]
        x0, t = trajectory.x0_at(rng.integers("critic.k", 0, self.steps)), rng.uniform("critic.u", *self.renoise_range)
        return DiscriminatorInputs(
            real=batch.real_latents,
            fake=flow.interpolate(x0, rng.normal("critic.fake", shape), t),
            t=t,
            e=rng.normal("critic.real", shape),
            cond=batch.cond,
        )

    def build(self, builder: ModelBuilder) -> DistillationModels:
        """Teacher, student, fake score with the discriminator."""
        return builder.distillation_models(self.steps, "dm")

    def sampler(self) -> SamplerConfig:
        """The student's own grid; full re-noising."""
        return SamplerConfig(steps=self.steps, shift=self.shift, eta=1.0)

    def extra_state(self, models: DistillationModels) -> dict[str, Tensor]:
        """The running AUC [K]."""
        return {"auc": models.discriminator_auc}

    def trained_networks(self, discriminator_trunk: bool) -> dict[str, Sequence[str]]:
        """Student, fake score, and the discriminator's trunk if it has one."""
        trunk: dict[str, Sequence[str]] = {"discriminator": ("fake_score_optimizer",)} if discriminator_trunk else {}
        return {"student": ("dm_optimizer",), "fake_score": ("fake_score_optimizer",), **trunk}

    def optimizer_steps(self, iteration: int) -> dict[str, int]:
        """Of the student where it is due, and of fake score and discriminator together."""
        student, learned = self.updates_student(iteration) * self.dm_updates, self.fake_score_updates
        return {"student": student, "fake_score": learned, "discriminator": learned}

    def forwards_per_sample(self, iteration: int, costs: Costs) -> dict[str, float]:
        """Forward passes per sample of an iteration by part, in units of one without gradient."""
        grad, gan, depth = 1 + costs.backward, bool(self.gan_loss_weight), costs.discriminator_depth
        return {
            "rollout": self.steps,
            "fake score": grad,
            "discriminator": gan * 2 * depth * (1 + costs.backward * costs.discriminator_trunk),
            # The GAN goes forward through the trunk, and back to x but not to its weights.
            "distribution matching": self.updates_student(iteration) * self.dm_updates * (grad + 2 + 1 + gan * 2 * depth),
        }
