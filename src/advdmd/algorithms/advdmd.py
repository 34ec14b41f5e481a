"""AdvDMD: DMD2 whose online discriminator is the reward of a policy gradient (arXiv 2604.28126)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from advdmd import flow, losses
from advdmd.algorithms.base import Algorithm, Costs, DistillationModels, ModelBuilder
from advdmd.algorithms.objectives import DiscriminatorInputs
from advdmd.algorithms.policy import PolicyUpdates
from advdmd.algorithms.updates import logit_gap, update_auc, update_fake_score, update_student
from advdmd.models.sampler import SamplerConfig
from advdmd.rng import Rng
from advdmd.rollout import Trajectory, rollout
from advdmd.transitions import cps
from advdmd.types import Batch, StepMetrics

FINAL_NOISE_RANGE = (0.02, 0.3)  # noise levels at which the discriminator is shown final images


class Updates(NamedTuple):
    """What an iteration does besides updating fake score and discriminator."""

    policy: bool
    distribution_matching: bool


@dataclass(frozen=True, kw_only=True)
class AdvDMD(PolicyUpdates, Algorithm[DistillationModels]):
    """Hyperparameters of AdvDMD, with those of PolicyUpdates. docs/papers.md gives the source of each default.

    Schedule: for `dm_only_iterations` distribution matching alone; then policy updates every 8th and, at the end of
    `policy_ramp_iterations`, every 2nd iteration, with distribution matching in every iteration; from then on a policy update
    every iteration and distribution matching every `dm_every`-th. A student of one step has policy updates
    with policy=forward only. Raises ValueError on values out of range.
    """

    shift: float = 3.0  # time shift of the student's grid
    fake_score_updates: int = 5  # optimizer steps of fake score and discriminator per rollout
    warmup_iterations: int = 0  # at first, without updates of the student: for one that is a few-step model already
    dm_only_iterations: int = 60
    policy_ramp_iterations: int = 60
    dm_every: int = 2
    dm_updates: int = 1  # optimizer steps on distribution matching per rollout, where it is due
    discriminator_every_nth_sample: int = 1  # every n-th sample is shown to the discriminator
    mismatched_caption_weight: float = 0.0  # of real images under mismatched captions as further generated images
    gan_loss_weight: float = 0.0  # of GAN back-propagation beside distribution matching (DMD2); the paper's method has none
    gan_fade: float = 0.0  # share of gan_loss_weight that is gone when policy_ramp_iterations are over
    discriminator_online: bool = True  # False: the discriminator is frozen after dm_only_iterations, an ablation
    renoise_range: tuple[float, float] = (0.02, 0.98)  # noise levels of the fake score and of distribution matching
    auc_decay: float = 0.9  # of the running AUC

    name: ClassVar[str] = "advdmd"
    uses_extra_rewards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"AdvDMD(steps={self.steps}): a student takes at least one step")
        cps(self.eta)
        if self.eta == 0 and self.steps > 1:
            raise ValueError("AdvDMD(eta=0): without noise a step is no action to prefer; use 0 < eta <= 1")
        super().__post_init__()
        for name in ("fake_score_updates", "dm_every", "dm_updates", "discriminator_every_nth_sample"):
            if getattr(self, name) < 1:
                raise ValueError(f"AdvDMD({name}={getattr(self, name)}): must be at least 1")
        flow.grid(self.steps, self.shift)
        if self.group_size % self.discriminator_every_nth_sample:
            raise ValueError(
                f"AdvDMD(discriminator_every_nth_sample={self.discriminator_every_nth_sample}): must divide "
                f"group_size={self.group_size}, so that no prompt is left out"
            )
        for name in ("mismatched_caption_weight", "gan_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"AdvDMD({name}={getattr(self, name)}): a weight of at least 0")
        if not 0 <= self.auc_decay < 1 or not 0 <= self.gan_fade <= 1:
            raise ValueError(
                f"AdvDMD(auc_decay={self.auc_decay}, gan_fade={self.gan_fade}): a decay in [0, 1) and a share in [0, 1]"
            )
        if not self.discriminator_online and self.dm_only_iterations == 0:
            raise ValueError(
                "AdvDMD(discriminator_online=false, dm_only_iterations=0): a discriminator frozen at once has learned nothing; "
                "set dm_only_iterations"
            )
        for name in ("warmup_iterations", "dm_only_iterations", "policy_ramp_iterations"):
            if getattr(self, name) < 0:
                raise ValueError(f"AdvDMD({name}={getattr(self, name)}): a count of iterations cannot be negative")
        low, high = self.renoise_range
        if not 0 < low < high < 1:
            raise ValueError(f"AdvDMD(renoise_range={self.renoise_range}): needs 0 < low < high < 1")

    def train_step(self, models: DistillationModels, batch: Batch, iteration: int, rng: Rng) -> StepMetrics:
        """One AdvDMD iteration (arXiv 2604.28126).

        One rollout, then updates of fake score and discriminator, of the policy, and of distribution matching, as the schedule
        says. The rollout is used three times: its states train the discriminator, its stochastic steps are the policy's
        actions, and distribution matching starts from its states.
        """
        updates = self.updates_at(iteration)
        shared_start = self.shares_start and updates.policy
        trajectory = self.rollout(models, batch, rng, shared_start)

        # 1. Fake score and discriminator follow the student.
        metrics = self.update_fake_score_and_discriminator(models, trajectory, batch, iteration, rng)
        spread = losses.within_group_std(trajectory.x[-1], self.group_size)
        metrics["student/within_group_std" + "_shared_start" * shared_start] = spread
        # 2. Policy gradient, before distribution matching moves the student: every ratio is 1.
        if updates.policy:
            metrics |= self.update_policy(models, trajectory, batch, rng)
        # 3. Distribution matching through one step of the same trajectory.
        if updates.distribution_matching:
            metrics |= self.update_student(models, trajectory, batch, rng, self.gan_weight_at(iteration))
        return metrics

    def updates_at(self, iteration: int) -> Updates:
        """The schedule of iteration 0, 1, ...: a function of the iteration alone, so that all ranks agree."""
        if iteration < self.warmup_iterations:
            return Updates(policy=False, distribution_matching=False)
        since = iteration - self.dm_only_iterations
        if since < 0 or not self.has_policy_updates:
            return Updates(policy=False, distribution_matching=True)
        if since < self.policy_ramp_iterations:
            every = round(8 * (2 / 8) ** (since / self.policy_ramp_iterations))
            return Updates(policy=since % every == 0, distribution_matching=True)
        return Updates(policy=True, distribution_matching=since % self.dm_every == 0)

    def rollout(self, models: DistillationModels, batch: Batch, rng: Rng, shared_start: bool = False) -> Trajectory:
        """The student's trajectory of N samples; with `shared_start`, of a group's first start: then rewards that the start
        alone decides have no advantage."""
        n, *shape = batch.real_latents.shape
        if n % self.group_size:
            raise ValueError(f"AdvDMD(group_size={self.group_size}): {n} samples per rank are not a multiple of it")
        noise = rng.normal("rollout", (self.steps, *shape)).transpose(0, 1)
        if shared_start:
            noise = torch.cat([noise[:1, self.first_of_group(n, noise.device)], noise[1:]])
        grid = flow.grid(self.steps, self.shift, noise.device)
        return rollout(models.student, batch.cond, noise, grid, cps(self.eta), self.samples_of_a_pass)

    def update_fake_score_and_discriminator(
        self, models: DistillationModels, trajectory: Trajectory, batch: Batch, iteration: int, rng: Rng
    ) -> StepMetrics:
        """Fake score and, while it trains, discriminator learn from the trajectory; moves the running AUC of each level."""
        n, trains = len(batch), self.discriminator_trains(iteration)
        inputs, level = self.discriminator_inputs(trajectory, batch, rng)
        metrics, logits = update_fake_score(
            models,
            trajectory,
            batch.cond,
            rng,
            inputs if trains else None,
            updates=self.fake_score_updates,
            micro_batch_size=self.samples_of_a_pass,
            renoise_range=self.renoise_range,
            every_nth=self.discriminator_every_nth_sample,
            mismatched_weight=self.mismatched_caption_weight,
            one_pass=2 * self.samples_of_a_pass >= 3 * n,  # no larger than the teacher's pass under guidance
        )
        if not trains:
            return metrics
        shown = torch.arange(n, device=level.device) % self.discriminator_every_nth_sample == 0
        columns = torch.stack([logits["real_logit"], logits["fake_logit"], shown.float(), level.float()])
        real, fake, shown, level = models.ranks.gather(columns)  # every rank computes the same AUC
        for k in range(1, self.steps + 1):
            at = (shown > 0) & (level == k)
            metrics[f"discriminator/auc_{k}"] = update_auc(models, real, fake, at, k, self.auc_decay)
            metrics[f"discriminator/logit_gap_{k}"] = logit_gap(real, fake, at)
        metrics["discriminator/logit_gap"] = logit_gap(real, fake, shown > 0)
        return metrics

    def discriminator_inputs(self, trajectory: Trajectory, batch: Batch, rng: Rng) -> tuple[DiscriminatorInputs, Tensor]:
        """What the discriminator is shown, and its level [N] in 1..K.

        State k of the trajectory or, for k = K, the final image re-noised to u in FINAL_NOISE_RANGE.
        """
        n, *shape = batch.real_latents.shape
        level = rng.integers("critic.k", 1, self.steps + 1)
        x, t = trajectory.at(level)
        final = level == self.steps
        t = torch.where(final, rng.uniform("critic.u", *FINAL_NOISE_RANGE), t)
        renoised = flow.interpolate(trajectory.x[-1], rng.normal("critic.fake", shape), t)
        other = batch.mismatched_cond
        if other is None:  # the prompt before it in the batch
            other = batch.cond[torch.arange(n).roll(self.group_size)]
        inputs = DiscriminatorInputs(
            real=batch.real_latents,
            fake=torch.where(flow.bcast(final, x), renoised, x),
            t=t,
            e=rng.normal("critic.real", shape),
            cond=batch.cond,
            mismatched_cond=other if self.mismatched_caption_weight else None,
            mismatched=other.differs(batch.cond),  # two prompts of a batch may be the same words
        )
        return inputs, level

    def update_student(
        self, models: DistillationModels, trajectory: Trajectory, batch: Batch, rng: Rng, gan_weight: float
    ) -> StepMetrics:
        """Optimizer steps of the student on distribution matching and, with a weight >= 0, on the GAN."""

        def gan_levels(name: str, k: Tensor, u: Tensor) -> Tensor:
            """Where the discriminator is trained on what step k leads to: the next level, or a small u for the final image."""
            return torch.where(k + 1 < self.steps, trajectory.t[k + 1], rng.uniform(f"{name}.w", *FINAL_NOISE_RANGE))

        return update_student(
            models,
            trajectory,
            batch.cond,
            rng,
            updates=self.dm_updates,
            micro_batch_size=self.samples_of_a_pass,
            renoise_range=self.renoise_range,
            gan_loss_weight=gan_weight,
            gan_levels=gan_levels,
        )

    def gan_weight_at(self, iteration: int) -> float:
        """The weight of the GAN loss in iteration 0, 1, ...: it falls by `gan_fade` over policy_ramp_iterations."""
        since = iteration + 1 - self.dm_only_iterations
        past = min(1.0, max(0, since) / self.policy_ramp_iterations) if self.policy_ramp_iterations else float(since > 0)
        return self.gan_loss_weight * (1 - self.gan_fade * past)

    def discriminator_trains(self, iteration: int) -> bool:
        """Whether the discriminator is updated in iteration 0, 1, ..."""
        return self.discriminator_online or iteration < self.dm_only_iterations

    def build(self, builder: ModelBuilder) -> DistillationModels:
        """Teacher, student with an optimizer of each update, fake score with the discriminator."""
        return builder.distillation_models(self.steps, "dm", "policy")

    def sampler(self) -> SamplerConfig:
        """The student's own grid and noise share."""
        return SamplerConfig(steps=self.steps, shift=self.shift, eta=self.eta)

    def extra_state(self, models: DistillationModels) -> dict[str, Tensor]:
        """The running AUC [K]."""
        return {"auc": models.discriminator_auc}

    def trained_networks(self, discriminator_trunk: bool) -> dict[str, Sequence[str]]:
        """Student, fake score, and the discriminator's trunk if it has one."""
        trunk: dict[str, Sequence[str]] = {"discriminator": ("fake_score_optimizer",)} if discriminator_trunk else {}
        return {"student": ("dm_optimizer", "policy_optimizer"), "fake_score": ("fake_score_optimizer",), **trunk}

    def optimizer_steps(self, iteration: int) -> dict[str, int]:
        """Of policy updates and distribution matching, and of fake score and discriminator together."""
        due, learned = self.updates_at(iteration), self.fake_score_updates
        student = due.policy + due.distribution_matching * self.dm_updates
        return {"student": student, "fake_score": learned, "discriminator": learned * self.discriminator_trains(iteration)}

    @property
    def conditions_per_sample(self) -> int:
        """2 with mismatched captions."""
        return 1 + bool(self.mismatched_caption_weight)

    def check_batch(self, prompts: int, world_size: int) -> None:
        """Raises ValueError if ranks cannot share the prompts, or if a mismatched caption has no other prompt to come from."""
        super().check_batch(prompts, world_size)
        if self.policy_step == "agreement" and world_size > 1 and prompts // world_size % 2:
            raise ValueError(
                f"algorithm.policy_step=agreement halves each process's prompts: prompts_per_step={prompts} for {world_size} "
                f"processes must be a multiple of {2 * world_size}"
            )
        if prompts < 2 and self.mismatched_caption_weight:
            raise ValueError("algorithm.mismatched_caption_weight needs prompts_per_step of at least 2: it is another prompt's")

    def forwards_per_sample(self, iteration: int, costs: Costs) -> dict[str, float]:
        """Forward passes per sample of an iteration by part, in units of one without gradient."""
        grad, depth, updates = 1 + costs.backward, costs.discriminator_depth, self.updates_at(iteration)
        shown = self.discriminator_trains(iteration) / self.discriminator_every_nth_sample
        kinds, grpo = 2 + bool(self.mismatched_caption_weight), self.policy == "grpo"
        return {
            "rollout": self.steps,
            "fake score": grad,
            "discriminator": shown * kinds * depth * (1 + costs.backward * costs.discriminator_trunk),
            "reward": updates.policy * ((self.steps - 1) * grpo + len(self.final_noise_levels)) * depth,
            "policy": updates.policy * (self.steps - 1 if grpo else self.forward_draws) * grad,
            "distribution matching": updates.distribution_matching
            * self.dm_updates
            * (grad + 2 + 1 + bool(self.gan_weight_at(iteration)) * 2 * depth),
        }
