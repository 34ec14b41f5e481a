"""The reinforcement half of AdvDMD: rewards, advantages, the policy loss, and when its gradients become a step."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from advdmd import losses
from advdmd.algorithms.base import Aux, DistillationModels, MicroBatches
from advdmd.algorithms.objectives import discriminator_rewards, forward_policy_loss, policy_loss
from advdmd.rng import Rng
from advdmd.rollout import Trajectory
from advdmd.transitions import cps
from advdmd.types import Batch, Index, Ranks, StepMetrics, as_floats, index_on, micro_batches

CREDIT = {"step": 0.0, "final": 1.0, "both": 0.5}  # the final reward's share of a step's credit
CHOICES = {
    "policy": ("grpo", "forward"),
    "policy_step": ("adam", "agreement"),
    "action": ("sample", "projected"),
    "credit": tuple(CREDIT),
}
LossOf = Callable[[Index, int], tuple[Tensor, Aux]]  # (indices of samples [n], number of the draw) -> loss [n], aux


class Advantages(NamedTuple):
    """by_step: of the stochastic steps [K - 1, N] or, on the forward process, of the final images [1, N].

    gate in [0, 1]: the mean AUC gate, for the learning rate.
    """

    by_step: Tensor
    gate: float
    metrics: StepMetrics


@dataclass(frozen=True, kw_only=True)
class PolicyUpdates(MicroBatches):
    """Hyperparameters of policy updates. Raises ValueError on values out of range.

    policy: `grpo` scores the steps that a trajectory took (Flow-GRPO), `forward` the student's predictions of its final images
    where those are noised again (DiffusionNFT). policy_step: `adam` makes a step of every rollout; `agreement` gathers
    gradients over rollouts and makes a step as long as their two halves agree.
    """

    steps: int = 4  # K
    eta: float = 1.0  # noise share of a step; 1 runs in stock schedulers
    group_size: int = 8  # samples per prompt; a group is never split between ranks
    policy: Literal["grpo", "forward"] = "grpo"
    policy_step: Literal["adam", "agreement"] = "adam"
    min_agreement: float = 0.1  # expected cosine of the halves of gathered gradients at which a step is made
    max_policy_rollouts: int = 32  # after which a step is made at the latest
    forward_draws: int = 1  # noises of a final image with policy=forward
    credit: Literal["step", "final", "both"] = "both"  # which reward a step gets: its own, the final image's, or half of each
    final_noise_levels: tuple[float, ...] = (0.02, 0.1, 0.3)  # of the final image's reward
    discriminator_reward_weight: float = 1.0  # of the discriminator beside a recipe's further rewards; 0: those alone
    auc_gating: bool = True  # policy updates scaled by losses.auc_gate of the discriminator's AUC at each level
    action: Literal["sample", "projected"] = "sample"  # of the policy: the next state, or Trajectory.projected_actions
    shared_start: bool = True  # with policy=grpo a group starts from the same noise in iterations with a policy update
    clip_range: float = 1e-5  # of the ratio at 65,536 latent dimensions D; scaled by sqrt(65536 / D)

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"AdvDMD(group_size={self.group_size}): an advantage compares at least two samples of a prompt")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"AdvDMD({name}={getattr(self, name)!r}): one of {', '.join(known)}")
        super().__post_init__()
        for name in ("max_policy_rollouts", "forward_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"AdvDMD({name}={getattr(self, name)}): must be at least 1")
        if not 0 <= self.min_agreement <= 1:
            raise ValueError(f"AdvDMD(min_agreement={self.min_agreement}): a cosine in [0, 1]")
        if not 0 < self.clip_range < math.inf:
            raise ValueError(f"AdvDMD(clip_range={self.clip_range}): must be above 0")
        if not 0 <= self.discriminator_reward_weight < math.inf:
            raise ValueError(f"AdvDMD(discriminator_reward_weight={self.discriminator_reward_weight}): must be at least 0")
        if not self.final_noise_levels or not all(0 < u < 1 for u in self.final_noise_levels):
            raise ValueError(f"AdvDMD(final_noise_levels={self.final_noise_levels}): noise levels inside (0, 1), at least one")

    @property
    def has_policy_updates(self) -> bool:
        """Whether the student can be rewarded: a single step has no action, but a final image."""
        return self.steps > 1 or self.policy == "forward"

    @property
    def shares_start(self) -> bool:
        """Whether a group starts from the same noise in iterations with a policy update."""
        return self.shared_start and self.policy == "grpo"

    @property
    def variant(self) -> str:
        """Whether gradients are another loss's, or gathered: then ranges of logged numbers are others too."""
        plain = self.policy == "grpo" and self.policy_step == "adam"
        return "" if plain else f"/{self.policy}-{self.policy_step}"

    @property
    def needs_extra_rewards(self) -> bool:
        """Whether the discriminator is no reward at all."""
        return self.discriminator_reward_weight == 0

    def update_policy(self, models: DistillationModels, trajectory: Trajectory, batch: Batch, rng: Rng) -> StepMetrics:
        """The policy gradient of a rollout, and an optimizer step of the student where one is due.

        policy_step=adam: one of every rollout, at a learning rate scaled by the mean gate. agreement: the gradients of two
        halves of the groups are gathered until they can be expected to agree by min_agreement, or max_policy_rollouts are
        over; the less they agree, the shorter is the step, and the mean gate has no role. Raises FloatingPointError if a
        replayed ratio is not 1.
        """
        found = self.advantages(models, trajectory, batch, rng)
        loss_of, draws = self.policy_loss(models, trajectory, batch, found.by_step, rng)
        if self.policy_step == "adam":
            every = self._passes(loss_of, torch.arange(len(batch)), draws)
            updated, aux = models.student.update(every, "policy", lr_scale=found.gate)
        else:
            turn = models.student.accumulated_rollouts("policy")
            halves = halves_of_groups(len(batch), self.group_size, models.ranks, turn)
            passes = [self._passes(loss_of, half, draws) for half in halves]
            updated, aux = models.student.accumulate(passes, "policy")
            agree = updated["policy/expected_agreement"] >= self.min_agreement
            if agree or updated["policy/rollouts"] >= self.max_policy_rollouts:
                updated |= models.student.step_by_agreement("policy", scaled_by="dm")
        if "ratio_error" not in aux:
            return found.metrics | updated
        (error,) = as_floats(models.ranks.gather(aux["ratio_error"].max()[None]).max()[None])
        if error > models.ratio_tolerance:
            raise FloatingPointError(f"policy: |ratio - 1| = {error:.2g} on replay, expected 0")
        return found.metrics | updated | {"policy/max_ratio_error": error}

    def _passes(self, loss_of: LossOf, samples: Tensor, draws: int) -> Iterator[tuple[Tensor, Aux]]:
        """The losses of samples with these indices [n], on the host, micro-batch by micro-batch."""
        for i in micro_batches(len(samples), self.samples_of_a_pass):
            for draw in range(draws):
                yield loss_of(samples[i], draw)

    def policy_loss(
        self, models: DistillationModels, trajectory: Trajectory, batch: Batch, advantage: Tensor, rng: Rng
    ) -> tuple[LossOf, int]:
        """The policy loss, and how many draws of each sample have one; advantage [K - 1, N] or [1, N]."""
        shape = trajectory.x.shape[2:]
        if self.policy == "grpo":
            settings = (cps(self.eta), self.scaled_clip_range(shape), self.action == "projected")

            def grpo(i: Index, draw: int) -> tuple[Tensor, Aux]:
                part = advantage[:, index_on(i, advantage.device)]
                return policy_loss(models, trajectory[i], batch.cond[i], part, *settings)

            return grpo, 1
        first = self.first_of_group(len(batch), trajectory.x.device)  # a group has the same draws, so that images alone differ
        names = [f"forward{draw or ''}" for draw in range(self.forward_draws)]
        levels = [trajectory.t[rng.integers(f"{name}.k", 0, self.steps)[first]] for name in names]
        noises = [rng.normal(f"{name}.e", shape)[first] for name in names]

        def forward(i: Index, draw: int) -> tuple[Tensor, Aux]:
            at = index_on(i, advantage.device)
            x0, u, e = trajectory.x[-1][at], levels[draw][at], noises[draw][at]
            return forward_policy_loss(models, x0, batch.cond[i], advantage[0, at], u, e)

        return forward, self.forward_draws

    def advantages(self, models: DistillationModels, trajectory: Trajectory, batch: Batch, rng: Rng) -> Advantages:
        """Advantages of N samples, A = w_D A_D + sum_i w_i A_i, each normalised over its groups first.

        Differences between the AUC gates of levels scale A_D. The mean gate is a common factor, which Adam would divide out
        again: it is for the learning rate. Further rewards of a recipe are of final images, count for all steps and have a gate
        of 1. Raises FloatingPointError if a reward is not finite.
        """
        e = rng.normal("reward.e", trajectory.x.shape[2:])[self.first_of_group(len(batch), trajectory.x.device)]
        final_only = self.policy == "forward"
        by_step, final = discriminator_rewards(
            models, trajectory, batch.cond, self.final_noise_levels, e, self.samples_of_a_pass, with_steps=not final_only
        )
        auc = models.discriminator_auc
        gate = losses.auc_gate(auc) if self.auc_gating else torch.ones_like(auc)
        advantage = self.group_advantage(models.ranks, final[None])
        if final_only:
            advantage, trusted = advantage * gate[-1], gate[-1]
        else:
            a_step = self.group_advantage(models.ranks, by_step)
            advantage, trusted = losses.gated_advantage(a_step, advantage, gate, CREDIT[self.credit])
        total = self.discriminator_reward_weight
        advantage, trusted = total * advantage, total * trusted
        rewards = {"final": final} | {str(i + 1): r for i, r in enumerate(by_step)}
        more = models.extra_rewards(trajectory.x[-1], batch.prompt_index) if models.extra_rewards else {}
        for name, (weight, r) in more.items():
            advantage = advantage + weight * self.group_advantage(models.ranks, r[None])
            trusted, total = trusted + weight, total + weight
            rewards[name] = r
        finite = torch.stack([by_step.isfinite().all(), final.isfinite().all()]).all()
        is_finite, mean_gate = as_floats(torch.stack([finite, trusted / total]))
        if not is_finite:
            raise FloatingPointError("policy: a reward is not finite")
        advantage = advantage / max(mean_gate, 1e-6)
        metrics: StepMetrics = {"policy/gate": mean_gate}
        for name, r in rewards.items():
            metrics[f"reward/{name}"] = r.mean()
            metrics[f"reward/{name}_std"] = r.reshape(*r.shape[:-1], -1, self.group_size).std(-1).mean()
        metrics["policy/frac_zero_advantage"] = (advantage.abs() < 1e-3).float().mean()
        return Advantages(advantage, mean_gate, metrics)

    def first_of_group(self, n: int, device: torch.device) -> Tensor:
        """Of each of n samples, the index of its group's first one, [n]."""
        return torch.arange(n, device=device) // self.group_size * self.group_size

    def group_advantage(self, ranks: Ranks, rewards: Tensor) -> Tensor:
        """Advantages of rewards [..., N] of this rank, normalised over the groups of all ranks. -> [..., N]"""
        n = rewards.shape[-1]
        return losses.group_advantage(ranks.gather(rewards), self.group_size)[..., ranks.rank * n : (ranks.rank + 1) * n]

    def scaled_clip_range(self, shape: torch.Size) -> float:
        """The clip range of the ratio for latents of this shape: the mean over D dimensions shrinks log-ratios by sqrt(D)."""
        return self.clip_range * math.sqrt(65536 / math.prod(shape))


def halves_of_groups(n: int, group_size: int, ranks: Ranks, turn: int) -> tuple[Tensor, Tensor]:
    """The indices [m] of this rank's n samples in groups with an even number, and in groups with an odd one.

    Groups are numbered over all ranks. turn: how many rollouts came before; with an odd number of groups the halves take turns.
    """
    group = torch.arange(n) // group_size + ranks.rank * (n // group_size)
    odd = (group + turn) % 2 == 1
    return (~odd).nonzero()[:, 0], odd.nonzero()[:, 0]
