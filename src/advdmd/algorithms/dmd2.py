"""DMD2: distribution matching, a GAN back-propagated into the student, backward simulation (arXiv 2405.14867)."""

from dataclasses import dataclass

import torch

from advdmd import flow, losses
from advdmd.algorithms.base import Cast
from advdmd.algorithms.objectives import match_teacher, tell_apart, track_student
from advdmd.kernels import renoise
from advdmd.rng import Rng
from advdmd.rollout import late_exits, rollout
from advdmd.types import Batch, Log


@dataclass(frozen=True, kw_only=True)
class DMD2:
    """Hyperparameters of DMD2; with gan = 0 it is DMD alone on backward-simulated inputs."""

    steps: int = 4
    shift: float = 3.0
    critic_steps: int = 5  # minibatches in which fake score and critic catch up (two time-scale rule)
    micro: int = 64
    gan: float = 5e-3  # weight of the generator's GAN loss
    u_range: tuple[float, float] = (0.02, 0.98)
    auc_memory: float = 0.9

    def __post_init__(self) -> None:
        for name in ("steps", "critic_steps", "micro"):
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

    def forwards(self, depth: float, backward: float = 2.0, trunk: bool = False) -> dict[str, float]:
        """Forwards per sample of one iteration by part (see AdvDMD.forwards)."""
        grad, gan = 1 + backward, bool(self.gan)
        return {
            "rollout": self.steps,
            "fake": grad,
            "critic": gan * 2 * depth * (1 + backward * trunk),
            "match": grad + 2 + 1 + gan * 2 * depth,  # forward through the trunk, and back to x but not to its weights
        }

    def iteration(self, cast: Cast, batch: Batch, step: int, rng: Rng) -> Log:
        cond, real = batch.cond, batch.real
        (N, *shape), K = real.shape, self.steps

        noise = rng.normal("rollout", (K, *shape)).transpose(0, 1)
        path = rollout(cast.student, cond, noise, flow.grid(K, self.shift), renoise)

        exits = late_exits(rng, "fake.k", K)  # the fake score tracks what distribution matching looks at: random exits
        x0, u, e = path.x0[exits, torch.arange(N)], rng.uniform("fake.u", *self.u_range), rng.normal("fake.e", shape)
        t, seen = rng.uniform("critic.u", *self.u_range), rng.normal("critic.real", shape)
        x = flow.interpolate(x0, rng.normal("critic.fake", shape), t)
        real_logits, fake_logits = torch.zeros(N), torch.zeros(N)

        def learn(i: torch.Tensor) -> torch.Tensor:
            loss = track_student(cast, x0[i], cond[i], u[i], e[i])
            if not self.gan:
                return loss
            a, b = tell_apart(cast, real[i], x[i], cond[i], t[i], seen[i])
            real_logits[i], fake_logits[i] = a.detach().float(), b.detach().float()
            return loss + losses.critic(a, b)

        log: Log = {}
        for minibatch in rng.permutation("critic.order").chunk(self.critic_steps):
            log = cast.fake.descend(learn(i) for i in minibatch.split(self.micro))
        now = losses.auc(real_logits, fake_logits)
        cast.auc.mul_(self.auc_memory).add_((1 - self.auc_memory) * now)
        log |= {"critic/auc": cast.auc[-1].item(), "critic/gap": (real_logits.mean() - fake_logits.mean()).item()}

        x, t = path.at(late_exits(rng, "match.k", K))
        u, e = rng.uniform("match.u", *self.u_range), rng.normal("match.e", shape)
        parts = torch.arange(N).split(self.micro)
        log |= cast.student.descend((match_teacher(cast, x[i], t[i], cond[i], u[i], e[i], self.gan) for i in parts), "match")
        return log
