"""Losses with their networks plugged in. Every random number arrives as an argument; one number per sample leaves."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from advdmd import flow, losses
from advdmd.algorithms.base import DistillationModels
from advdmd.rollout import Trajectory, step_distribution
from advdmd.transitions import StepCoefficients
from advdmd.types import cat_conds


def fake_score_loss(cast: DistillationModels, x0: Tensor, cond: Any, u: Tensor, e: Tensor, k: Tensor) -> Tensor:
    """Flow matching on what the student saw at hops k keeps the fake score honest (DMD2, 2405.14867, Sec. 4.2)."""
    return losses.flow_matching(cast.fake(flow.interpolate(x0, e, u), u, cond, k), x0, e)


def discriminator_logits(
    cast: DistillationModels,
    real: Tensor,
    x: Tensor,
    cond: Any,
    t: Tensor,
    e: Tensor,
    wrong: Any = None,
    together: bool = False,
) -> list[Tensor]:
    """The critic's logits on real images and on the student's states x, both at noise level t, and on the same real images
    under `wrong` conditions if there are any: in a pass of their own, or, as small passes are dear, `together`."""
    image = flow.interpolate(real, e, t)
    seen = [(image, cond), (x, cond)] + [(image, wrong)] * (wrong is not None)
    logits: list[Tensor] = []
    for part in [seen] if together else [seen[:2], seen[2:]]:
        if part:
            images, conds = zip(*part, strict=True)
            logits += cast.critic(torch.cat(images), t.repeat(len(part)), cat_conds(conds)).chunk(len(part))
    return logits


def distribution_matching_loss(
    cast: DistillationModels, x: Tensor, t: Tensor, cond: Any, u: Tensor, e: Tensor, k: Tensor, w: Tensor, gan: float = 0.0
) -> Tensor:
    """Distribution matching at u for the x0 the student sees from x at hops k (DMD2, 2405.14867, Eq. 2), plus gan x its
    realism re-noised to w (Eq. 4)."""
    x0 = flow.x0_from_velocity(x, cast.student(x, t, cond), t)
    x_u = flow.interpolate(x0, e, u)
    with torch.no_grad():
        x0_teacher = flow.x0_from_velocity(x_u, cast.teacher(x_u, u, cond), u)
        x0_fake = flow.x0_from_velocity(x_u, cast.fake(x_u, u, cond, k), u)
    loss = losses.dmd(x0, x0_teacher, x0_fake)
    return loss + gan * losses.gan_generator(cast.critic.follow(flow.interpolate(x0, e, w), w, cond)) if gan else loss


@torch.no_grad()
def discriminator_rewards(
    cast: DistillationModels, path: Trajectory, cond: Any, levels: Sequence[float], e: Tensor, micro: int
) -> tuple[Tensor, Tensor]:
    """[K - 1, N] a hop earns the critic's logit at the state it reached, [N] the final image its mean logit over a few low
    noise levels; `micro` states of whatever hop a pass."""
    n, low = len(cond), torch.tensor(levels)
    ends = [flow.interpolate(path.x[-1], e, u.expand(n)) for u in low]
    x, t = torch.cat([*path.x[1:-1], *ends]), torch.cat([path.t[1:-1], low]).repeat_interleave(n)
    logits = torch.cat([cast.critic(x[i], t[i], cond[i % n]) for i in torch.arange(len(x)).split(micro)]).view(-1, n)
    return logits[: -len(low)], logits[-len(low) :].mean(0)


def policy_loss(
    cast: DistillationModels,
    path: Trajectory,
    cond: Any,
    gain: Tensor,
    kernel: StepCoefficients,
    clip: float,
    seen: bool = False,
) -> tuple[Tensor, Tensor]:
    """Clipped policy gradient over the stochastic hops of a path (Flow-GRPO, 2505.05470, Eq. 5).

    gain [K - 1, N] -> loss [N], averaged over hops, and the largest |ratio - 1| seen. With `seen` the action is not where a
    hop landed but what the next hop saw there (rollout.Path.sights).
    """
    total, off = torch.zeros(len(cond)), torch.zeros(())
    actions, close_old = path.sights(kernel) if seen else (path.x[1:-1], path.close)
    for k, action in enumerate(actions):
        step, _ = step_distribution(cast.student, path.x[k], path.t[k], path.t[k + 1], cond, kernel)
        close = step.closeness(action)
        total = total + losses.ppo_clip(close, close_old[k], gain[k], clip)
        off = torch.maximum(off, ((close - close_old[k]).detach().exp() - 1).abs().max())
    return total / max(1, len(path.close)), off
