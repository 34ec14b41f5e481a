"""AdvDMD: DMD2 whose online discriminator is the reward of a policy gradient (arXiv 2604.28126)."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from advdmd import flow, losses
from advdmd.algorithms import updates
from advdmd.algorithms.base import DistillationModels
from advdmd.algorithms.objectives import discriminator_logits, discriminator_rewards, policy_loss
from advdmd.rng import Rng
from advdmd.rollout import Trajectory, rollout
from advdmd.transitions import cps
from advdmd.types import Batch, Metrics, conds_differ

FINAL_NOISE_RANGE = (0.02, 0.3)  # noise levels at which the critic is shown final images
RATIO_TOLERANCE = 1e-5  # of |ratio - 1| on replay in fp32: more means the path is not the policy's own


class Updates(NamedTuple):
    """What an iteration does besides letting fake score and critic catch up."""

    policy: bool
    match: bool


@dataclass(frozen=True, kw_only=True)
class AdvDMD:
    """Hyperparameters of AdvDMD; docs/papers.md gives the source of each default.

    Schedule: for `warmup` iterations distribution matching alone; then policy turns every 8th, at the end of `ramp` every
    2nd iteration; from then on one every iteration and distribution matching every `match_every`-th.
    """

    steps: int = 4  # K, hops of the student
    shift: float = 3.0
    eta: float = 1.0  # noise share of a hop; 1 runs in stock schedulers
    group: int = 8  # G, samples per prompt; a group never straddles ranks
    critic_steps: int = 5  # minibatches in which fake score and critic catch up
    micro: int = 64  # samples per forward-backward
    warmup: int = 60
    ramp: int = 60
    match_every: int = 2
    match_turns: int = 1  # descents on distribution matching per path, where it is due
    judge_every: int = 1  # one sample in so many is shown to the critic, which costs most where it has a trunk of its own
    credit: Literal["step", "final", "both"] = "both"
    final_levels: tuple[float, ...] = (0.02, 0.1, 0.3)
    mismatch: float = 0.0  # weight of real images under wrong captions as further fakes
    gan: float = 0.0  # weight of GAN back-propagation beside distribution matching, as in DMD2; the paper's method has none
    gated: bool = True
    online: bool = True  # the critic goes on learning after the warm-up; False freezes it there, to see what that costs
    action: Literal["landed", "seen"] = "landed"  # what the policy is paid for: where a hop landed, or what the next one saw
    clip: float = 1e-5  # at 65,536 latent dimensions; scaled by sqrt(65536 / D)
    u_range: tuple[float, float] = (0.02, 0.98)
    auc_memory: float = 0.9

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"AdvDMD(steps={self.steps}): a student takes at least one step")
        cps(self.eta)
        if self.eta == 0 and self.steps > 1:
            raise ValueError("AdvDMD(eta=0): without noise a hop is no action to prefer; use 0 < eta <= 1")
        if self.group < 2:
            raise ValueError(f"AdvDMD(group={self.group}): an advantage compares at least two samples of a prompt")
        for name in ("critic_steps", "micro", "match_every", "match_turns", "judge_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"AdvDMD({name}={getattr(self, name)}): must be at least 1")
        flow.grid(self.steps, self.shift)
        if self.group % self.judge_every:
            raise ValueError(
                f"AdvDMD(judge_every={self.judge_every}): must divide group={self.group}, so that no prompt is left out"
            )
        if self.clip <= 0 or min(self.mismatch, self.gan) < 0 or not 0 <= self.auc_memory < 1:
            raise ValueError(
                f"AdvDMD(clip={self.clip}, mismatch={self.mismatch}, gan={self.gan}, auc_memory={self.auc_memory}): "
                "needs clip > 0, mismatch >= 0, gan >= 0, auc_memory in [0, 1)"
            )
        if self.action not in ("landed", "seen") or self.credit not in ("step", "final", "both"):
            raise ValueError(
                f"AdvDMD(action={self.action!r}, credit={self.credit!r}): action: landed or seen; credit: step, final or both"
            )
        if not self.online and self.warmup == 0:
            raise ValueError("AdvDMD(online=False, warmup=0): a critic frozen at once has learned nothing; warm it up first")
        if self.warmup < 0 or self.ramp < 0:
            raise ValueError(f"AdvDMD(warmup={self.warmup}, ramp={self.ramp}): counts of iterations cannot be negative")
        if not self.final_levels or not all(0 < u < 1 for u in self.final_levels):
            raise ValueError(f"AdvDMD(final_levels={self.final_levels}): noise levels inside (0, 1), at least one")
        low, high = self.u_range
        if not 0 < low < high < 1:
            raise ValueError(f"AdvDMD(u_range={self.u_range}): needs 0 < low < high < 1")

    def turn(self, step: int) -> Updates:
        """The schedule of step 0, 1, ...: a function of the step alone, so that all ranks agree."""
        since = step - self.warmup
        if since < 0 or self.steps == 1:
            return Updates(policy=False, match=True)
        if since < self.ramp:
            every = round(8 * (2 / 8) ** (since / self.ramp))
            return Updates(policy=since % every == 0, match=True)
        return Updates(policy=True, match=since % self.match_every == 0)

    def critic_learns(self, step: int) -> bool:
        return self.online or step < self.warmup

    def forwards(self, step: int, depth: float, backward: float = 2.0, trunk: bool = False) -> dict[str, float]:
        """Forwards per sample of iteration `step` by part, in units of one forward without gradient.

        depth: share of the network that the critic runs; backward: 2 for full fine-tuning, about 1 with adapters;
        trunk: whether the critic's gradient enters the trunk (CriticConfig.gradient > 0).
        """
        grad, turn = 1 + backward, self.turn(step)
        return {
            "rollout": self.steps,
            "fake": grad,
            "critic": self.critic_learns(step) * (2 + bool(self.mismatch)) * depth * (1 + backward * trunk) / self.judge_every,
            "reward": turn.policy * (self.steps - 1 + len(self.final_levels)) * depth,
            "policy": turn.policy * (self.steps - 1) * grad,
            "match": turn.match * self.match_turns * (grad + 2 + 1 + bool(self.gan) * 2 * depth),
        }

    def iteration(self, cast: DistillationModels, batch: Batch, step: int, rng: Rng) -> Metrics:
        cond, real, turn = batch.cond, batch.real, self.turn(step)
        N, K, shape = len(real), self.steps, real.shape[1:]
        if N % self.group:
            raise ValueError(f"AdvDMD(group={self.group}): {N} samples per rank are not a multiple of it")
        parts = torch.arange(N).split(self.micro)
        kernel = cps(self.eta)

        # Roll the student out once, without gradient. Everything below reuses this path.
        noise = rng.normal("rollout", (K, *shape)).transpose(0, 1)
        path = rollout(cast.student, cond, noise, flow.grid(K, self.shift), kernel, self.micro)

        # The fake score and the critic catch up with where the student now is.
        log = self.catch_up(cast, path, batch, rng, self.critic_learns(step))
        log["path/group_spread"] = losses.within_group_std(path.x[-1], self.group).item()

        # Policy turn. First, while the path is still on-policy: every ratio starts at one.
        if turn.policy:
            gain, paid = self.advantages(cast, path, batch, rng)
            replay: list[Tensor] = []

            def prefer(i: Tensor) -> Tensor:
                loss, off = policy_loss(
                    cast, path[i], cond[i], gain[:, i], kernel, self.clip_range(shape), self.action == "seen"
                )
                replay.append(off)
                return loss

            log |= cast.student.descend((prefer(i) for i in parts), turn="policy") | paid
            log["policy/ratio_off"] = cast.team.gather(torch.stack(replay).max()[None]).max().item()
            if log["policy/ratio_off"] > RATIO_TOLERANCE:
                raise FloatingPointError(f"policy: |ratio - 1| = {log['policy/ratio_off']:.2g} on replay, expected 0")

        # Distribution-matching turn. Gradient flows through one hop of the same path.
        if turn.match:

            def landing(k: Tensor) -> Tensor:  # where the critic will meet what hop k saw
                return torch.where(k + 1 < K, path.t[k + 1], rng.uniform("match.w", *FINAL_NOISE_RANGE))

            how = {"micro": self.micro, "u_range": self.u_range, "times": self.match_turns, "gan": self.gan, "level": landing}
            log |= updates.update_student(cast, path, cond, rng, **how)
        return log

    def catch_up(self, cast: DistillationModels, path: Trajectory, batch: Batch, rng: Rng, judging: bool) -> Metrics:
        """Fake score and, if `judging`, critic learn from the path; updates the running AUC per level."""
        (N, *shape), K, cond = batch.real.shape, path.hops, batch.cond
        x, t, k = self.critic_states(path, rng, shape)
        noise = rng.normal("critic.real", shape)
        # The same real image under another prompt of the step.
        wrong = cond[torch.arange(N).roll(self.group)] if batch.other is None else batch.other
        other = conds_differ(wrong, cond)  # two prompts of a batch may be the same words
        real_logits, fake_logits = torch.zeros(N), torch.zeros(N)
        shown = (torch.arange(N) % self.judge_every == 0) & judging
        together = 2 * self.micro >= 3 * N  # no larger a pass than the teacher's under guidance

        def judge(i: Tensor, n: int) -> Tensor:
            loss, seen = torch.zeros(len(i)), shown[i]
            here = int(seen.sum())
            if not judging or (not here and cast.team.size == 1):
                return loss
            i = i[seen] if here else i[:1]  # of several processes each makes a pass
            at = (batch.real[i], x[i], cond[i], t[i], noise[i], wrong[i] if self.mismatch else None)
            real, fake, *under = discriminator_logits(cast, *at, together)
            own = slice(min(n, here))
            real_logits[i[own]], fake_logits[i[own]] = real.detach().float()[own], fake.detach().float()[own]
            told = losses.gan_discriminator(real, fake)
            if self.mismatch:
                told = told + self.mismatch * other[i] * losses.gan_mismatched_caption(under[0])
            return loss.index_put((seen.nonzero()[:, 0],), self.judge_every * told[:here])

        log = updates.update_fake_score(
            cast, path, cond, rng, judge, steps=self.critic_steps, micro=self.micro, u_range=self.u_range
        )
        if not judging:
            return log
        told = torch.stack([real_logits, fake_logits, shown.float(), k.float()])
        real_logits, fake_logits, shown, k = cast.team.gather(told)  # every process learns the same AUC
        shown = shown > 0
        for level in range(1, K + 1):
            at = shown & (k == level)
            now = losses.auc(real_logits[at], fake_logits[at]) if at.any() else cast.auc[level - 1]
            cast.auc[level - 1] = self.auc_memory * cast.auc[level - 1] + (1 - self.auc_memory) * now
            log[f"critic/auc_{level}"] = cast.auc[level - 1].item()
            if at.any():  # of all processes' samples, so all of them agree
                log[f"critic/gap_{level}"] = (real_logits[at].mean() - fake_logits[at].mean()).item()
        log["critic/gap"] = (real_logits[shown].mean() - fake_logits[shown].mean()).item()
        return log

    def critic_states(self, path: Trajectory, rng: Rng, shape: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """What the critic is shown: each sample at one level k of its path; the final image re-noised to a small u."""
        k = rng.index("critic.k", 1, path.hops + 1)
        x, t = path.at(k)
        end = k == path.hops
        t = torch.where(end, rng.uniform("critic.u", *FINAL_NOISE_RANGE), t)
        seen = flow.interpolate(path.x[-1], rng.normal("critic.fake", shape), t)
        return torch.where(flow.bcast(end, x), seen, x), t, k

    def advantages(self, cast: DistillationModels, path: Trajectory, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """[K - 1, N] what each hop is worth, believed as far as the critic's AUC at its level allows.

        Further rewards of a recipe are paid for final images, to all hops: r = D + sum_i w_i r_i, each made comparable within
        its group first.
        """
        cond, K, shape = batch.cond, path.hops, path.x.shape[2:]
        leader = torch.arange(len(cond)) // self.group * self.group
        e = rng.normal("reward.e", shape)[leader]  # the same noise for the whole group
        hops, end = discriminator_rewards(cast, path, cond, self.final_levels, e, self.micro)
        if not (hops.isfinite().all() and end.isfinite().all()):
            raise FloatingPointError("policy: a reward is not finite")
        gate = losses.auc_gate(cast.auc) if self.gated else torch.ones(K)
        by_step = self.relative(cast, hops) * gate[:-1, None]
        by_end = self.relative(cast, end[None]) * gate[-1]
        gain = {"step": by_step, "final": by_end.expand_as(by_step), "both": 0.5 * (by_step + by_end)}[self.credit]
        spread = lambda r: r.unflatten(-1, (-1, self.group)).std(-1).mean().item()  # noqa: E731
        paid: Metrics = {"reward/end": end.mean().item(), "reward/end_spread": spread(end)}
        for i, r in enumerate(hops):
            paid |= {f"reward/{i + 1}": r.mean().item(), f"reward/{i + 1}_spread": spread(r)}
        for name, (weight, r) in (cast.bonus(path.x[-1], batch.prompt) if cast.bonus else {}).items():
            gain = gain + weight * self.relative(cast, r[None])
            paid |= {f"reward/{name}": r.mean().item(), f"reward/{name}_spread": spread(r)}
        paid["policy/zero_share"] = (gain.abs() < 1e-3).float().mean().item()
        return gain, paid

    def relative(self, cast: DistillationModels, rewards: Tensor) -> Tensor:
        """[..., N] advantages of rewards [..., N], spread pooled over the groups of all processes."""
        n = rewards.shape[-1]
        return losses.group_advantage(cast.team.gather(rewards), self.group)[..., cast.team.rank * n : (cast.team.rank + 1) * n]

    def clip_range(self, shape: torch.Size) -> float:
        """The ratio's clip range for latents of this shape."""
        return self.clip * math.sqrt(65536 / math.prod(shape))
