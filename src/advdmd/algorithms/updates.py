"""The two turns that AdvDMD and DMD2 share, with their draws: the fake score catches up, the student matches the teacher."""

from collections.abc import Callable

import torch
from torch import Tensor

from advdmd.algorithms.base import DistillationModels
from advdmd.algorithms.objectives import distribution_matching_loss, fake_score_loss
from advdmd.rng import Rng
from advdmd.rollout import Trajectory, sample_exit_steps
from advdmd.types import Cond, Metrics


def update_fake_score(
    cast: DistillationModels,
    path: Trajectory,
    cond: Cond,
    rng: Rng,
    judge: Callable[[Tensor, int], Tensor],
    *,
    steps: int,
    micro: int,
    u_range: tuple[float, float],
) -> Metrics:
    """One pass over the path in `steps` minibatches, one descent each, so that the fake score is where the student is.

    It tracks what distribution matching looks at, x0 at random exits, and is told which of them. `judge(i, n)` is the
    critic's loss on samples i, of which the first n are to be remembered, learned in the same descents.
    """
    exits, shape = sample_exit_steps(rng, "fake.k", path.hops), path.x.shape[2:]
    x0 = path.x0[exits, torch.arange(len(exits))]
    u, e = rng.uniform("fake.u", *u_range), rng.normal("fake.e", shape)

    def caught_up(i: Tensor) -> Tensor:
        """The loss on samples i; where this process has none, of one that counts for nothing: networks that are spread over
        processes need as many passes of each."""
        j = i if len(i) else torch.zeros(1, dtype=torch.long)
        loss = fake_score_loss(cast, x0[j], cond[j], u[j], e[j], exits[j]) + judge(j, len(i))
        return loss[: len(i)]

    log: Metrics = {}
    for minibatch, passes in rng.minibatches("critic.order", steps, micro):
        parts = [minibatch[k * micro : (k + 1) * micro] for k in range(passes)]
        log = cast.fake.descend(caught_up(i) for i in parts)
    return log


def update_student(
    cast: DistillationModels,
    path: Trajectory,
    cond: Cond,
    rng: Rng,
    *,
    micro: int,
    u_range: tuple[float, float],
    times: int = 1,
    gan: float = 0.0,
    level: Callable[[Tensor], Tensor] | None = None,
) -> Metrics:
    """Descents of the student on distribution matching, `times` on one path: gradient flows through one random hop of it.

    A path costs half as much as a descent with its teacher and fake score, and its states stay the student's own for a few
    small steps. With gan > 0 the critic's gradient joins: the x0 seen at hops k is shown re-noised to `level(k)`, or where
    matching looks if there is no such rule.
    """
    log: Metrics = {}
    for turn in range(times):
        name = f"match{turn or ''}"  # draws of its own
        k = sample_exit_steps(rng, f"{name}.k", path.hops)
        x, t = path.at(k)
        u, e = rng.uniform(f"{name}.u", *u_range), rng.normal(f"{name}.e", path.x.shape[2:])
        w = level(k) if level else u
        parts = torch.arange(len(x)).split(micro)
        parted = (distribution_matching_loss(cast, x[i], t[i], cond[i], u[i], e[i], k[i], w[i], gan) for i in parts)
        log = cast.student.descend(parted, turn="match")
    return log
