"""DMD2: distribution matching, a GAN back-propagated into the student, backward simulation (arXiv 2405.14867)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from advdmd import flow, losses
from advdmd.algorithms import updates
from advdmd.algorithms.base import DistillationModels
from advdmd.algorithms.objectives import discriminator_logits
from advdmd.rng import Rng
from advdmd.rollout import rollout
from advdmd.transitions import renoise
from advdmd.types import Batch, Metrics


@dataclass(frozen=True, kw_only=True)
class DMD2:
    """Hyperparameters of DMD2; with gan = 0 it is DMD alone on backward-simulated inputs."""

    steps: int = 4
    shift: float = 3.0
    group: int = 8  # samples per prompt: only the dealing of batches looks at it
    critic_steps: int = 5  # minibatches in which fake score and critic catch up (two time-scale rule)
    match_turns: int = 1  # descents of the student per path
    micro: int = 64
    gan: float = 5e-3  # weight of the generator's GAN loss
    u_range: tuple[float, float] = (0.02, 0.98)
    auc_memory: float = 0.9

    def __post_init__(self) -> None:
        for name in ("steps", "group", "critic_steps", "match_turns", "micro"):
            if getattr(self, name) < 1:
                raise ValueError(f"DMD2({name}={getattr(self, name)}): must be at least 1")
        flow.grid(self.steps, self.shift)
        if not 0 <= self.auc_memory < 1:
            raise ValueError(f"DMD2(auc_memory={self.auc_memory}): lies in [0, 1)")
        if self.gan < 0:
            raise ValueError(f"DMD2(gan={self.gan}): a weight cannot be negative; 0 turns the GAN off")
        low, high = self.u_range
        if not 0 < low < high < 1:
            raise ValueError(f"DMD2(u_range={self.u_range}): needs 0 < low < high < 1")

    def forwards(self, step: int, depth: float, backward: float = 2.0, trunk: bool = False) -> dict[str, float]:
        """Forwards per sample of any iteration by part (see AdvDMD.forwards)."""
        grad, gan = 1 + backward, bool(self.gan)
        return {
            "rollout": self.steps,
            "fake": grad,
            "critic": gan * 2 * depth * (1 + backward * trunk),
            "match": self.match_turns
            * (grad + 2 + 1 + gan * 2 * depth),  # forward through the trunk, and back to x but not to its weights
        }

    def iteration(self, cast: DistillationModels, batch: Batch, step: int, rng: Rng) -> Metrics:
        cond, real = batch.cond, batch.real
        (N, *shape), K = real.shape, self.steps

        noise = rng.normal("rollout", (K, *shape)).transpose(0, 1)
        path = rollout(cast.student, cond, noise, flow.grid(K, self.shift), renoise, self.micro)

        # The critic sees what the student would leave at a random hop, re-noised to a random level.
        x0 = path.x0[rng.index("critic.k", 0, K), torch.arange(N)]
        t, seen = rng.uniform("critic.u", *self.u_range), rng.normal("critic.real", shape)
        x = flow.interpolate(x0, rng.normal("critic.fake", shape), t)
        real_logits, fake_logits = torch.zeros(N), torch.zeros(N)

        def judge(i: Tensor, n: int) -> Tensor:
            if not self.gan:
                return torch.zeros(len(i))
            real_, fake = discriminator_logits(cast, real[i], x[i], cond[i], t[i], seen[i])
            real_logits[i[:n]], fake_logits[i[:n]] = real_.detach().float()[:n], fake.detach().float()[:n]
            return losses.gan_discriminator(real_, fake)

        log = updates.update_fake_score(
            cast, path, cond, rng, judge, steps=self.critic_steps, micro=self.micro, u_range=self.u_range
        )
        real_logits, fake_logits = cast.team.gather(torch.stack([real_logits, fake_logits]))
        now = losses.auc(real_logits, fake_logits)
        cast.auc.mul_(self.auc_memory).add_((1 - self.auc_memory) * now)
        log["path/group_spread"] = losses.within_group_std(path.x[-1], self.group).item()
        log |= {"critic/auc": cast.auc[-1].item(), "critic/gap": (real_logits.mean() - fake_logits.mean()).item()}
        how = {"micro": self.micro, "u_range": self.u_range, "times": self.match_turns, "gan": self.gan}
        return log | updates.update_student(cast, path, cond, rng, **how)
