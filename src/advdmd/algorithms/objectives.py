"""Losses with their networks. Every random number is an argument; one number per sample is returned."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advdmd import flow, losses
from advdmd.algorithms.base import Aux, DistillationModels
from advdmd.rollout import Trajectory, step_distribution
from advdmd.transitions import StepCoefficients
from advdmd.types import Columns, Cond, micro_batches, moved


@dataclass(frozen=True)
class DiscriminatorInputs(Columns):
    """What the discriminator sees of N samples.

    real, fake [N, ...]: a clean latent of a real image and a state of the student, which is at noise level t [N] already.
    e [N, ...]: the noise that takes `real` to t. cond: conditions [N].
    mismatched_cond: other prompts for the same real images, or None. mismatched [N]: 1.0 where they are other words.
    """

    real: Tensor
    fake: Tensor
    t: Tensor
    e: Tensor
    cond: Cond
    mismatched_cond: Cond | None = None
    mismatched: Tensor | None = None


def fake_score_loss(models: DistillationModels, x0: Tensor, cond: Cond, u: Tensor, e: Tensor, k: Tensor) -> Tensor:
    """Flow matching of the fake score on the student's predictions (DMD2, 2405.14867, Sec. 4.2).

    x0 [N, ...]: predictions at steps k [N], re-noised to u [N] with noise e [N, ...]. -> [N]
    """
    return losses.flow_matching(models.fake_score(flow.interpolate(x0, e, u), u, cond, k), x0, e)


def discriminator_logits(models: DistillationModels, inputs: DiscriminatorInputs, one_pass: bool) -> list[Tensor]:
    """Logits [N] of real images, of the student's states and, if there are mismatched conditions, of real images under them.

    one_pass: all three in one forward pass, which is quicker for few samples; otherwise the third has a pass to itself.
    """
    real = flow.interpolate(inputs.real, inputs.e, inputs.t)
    parts = [(real, inputs.cond), (inputs.fake, inputs.cond)]
    if inputs.mismatched_cond is not None:
        parts.append((real, inputs.mismatched_cond))
    logits: list[Tensor] = []
    for group in [parts] if one_pass else [parts[:2], parts[2:]]:
        if group:
            x, cond = torch.cat([x for x, _ in group]), Cond.cat([c for _, c in group])
            logits += models.discriminator(x, inputs.t.repeat(len(group)), cond).chunk(len(group))
    return logits


def discriminator_loss(
    models: DistillationModels,
    inputs: DiscriminatorInputs,
    shown: Tensor,
    scale: float,
    mismatched_weight: float,
    one_pass: bool,
) -> tuple[Tensor, Aux]:
    """The GAN loss of the discriminator on those of N samples that are shown, times `scale`; 0 for the others. -> [N]

    shown: their indices [n], on the host; if there are none, one sample is passed and counts for nothing, because sharded
    networks need as many passes on every rank. mismatched_weight >= 0: weight of real images under mismatched captions as
    further generated ones. Also returns the logits "real_logit" and "fake_logit" [N], 0 where a sample is not shown.
    """
    kept, at = len(shown), moved(shown, inputs.t.device)
    zeros = torch.zeros(len(inputs), device=inputs.t.device)
    if not kept and models.ranks.world_size == 1:
        return zeros, {"real_logit": zeros, "fake_logit": zeros}
    used = inputs[shown] if kept else inputs[:1]
    real, fake, *mismatched = discriminator_logits(models, used, one_pass)
    loss = losses.gan_discriminator(real, fake)
    if mismatched_weight:
        assert used.mismatched is not None
        loss = loss + mismatched_weight * used.mismatched * losses.gan_mismatched_caption(mismatched[0])
    logits = {
        "real_logit": zeros.index_put((at,), real.detach().float()[:kept]),
        "fake_logit": zeros.index_put((at,), fake.detach().float()[:kept]),
    }
    return zeros.index_put((at,), scale * loss[:kept]), logits


def distribution_matching_loss(models: DistillationModels, x0: Tensor, cond: Cond, u: Tensor, e: Tensor, k: Tensor) -> Tensor:
    """Distribution matching of predictions x0 [N, ...] made at steps k [N] (DMD2, 2405.14867, Eq. 2). -> [N]

    Teacher and fake score are compared at x0 re-noised to u [N] with noise e [N, ...]; the gradient flows through x0 alone.
    """
    x_u = flow.interpolate(x0, e, u)
    with torch.no_grad():
        x0_teacher = flow.x0_from_velocity(x_u, models.teacher(x_u, u, cond), u)
        x0_fake = flow.x0_from_velocity(x_u, models.fake_score(x_u, u, cond, k), u)
    return losses.dmd(x0, x0_teacher, x0_fake)


def student_loss(
    models: DistillationModels,
    x: Tensor,
    t: Tensor,
    cond: Cond,
    k: Tensor,
    u: Tensor,
    e: Tensor,
    w: Tensor,
    gan_loss_weight: float,
) -> tuple[Tensor, Aux]:
    """The student's loss at states x [N, ...] of steps k [N], at times t [N].

    Distribution matching + gan_loss_weight * GAN. -> [N]

    u, w [N]: noise levels of distribution matching and of the GAN (DMD2, 2405.14867, Eq. 4); e [N, ...]: their noise. Also
    returns the two losses apart.
    """
    x0 = flow.x0_from_velocity(x, models.student(x, t, cond), t)
    dm_loss = distribution_matching_loss(models, x0, cond, u, e, k)
    if not gan_loss_weight:
        return dm_loss, {"dm_loss": dm_loss.detach()}
    gan_loss = losses.gan_generator(models.discriminator.generator_logit(flow.interpolate(x0, e, w), w, cond))
    return dm_loss + gan_loss_weight * gan_loss, {"dm_loss": dm_loss.detach(), "gan_loss": gan_loss.detach()}


@torch.no_grad()
def discriminator_rewards(
    models: DistillationModels,
    trajectory: Trajectory,
    cond: Cond,
    levels: Sequence[float],
    e: Tensor,
    micro_batch_size: int,
    with_steps: bool = True,
) -> tuple[Tensor, Tensor]:
    """Rewards of a trajectory of N samples, without gradient: of its steps [K - 1, N], and of its final images [N].

    A step's reward is the logit of the state that it leads to, D(x[k + 1], t[k + 1], cond). The final reward is the mean logit
    of the final image re-noised to each of `levels`, in (0, 1), with noise e [N, ...]. At most `micro_batch_size` states per
    forward pass. Without `with_steps`, final images alone are judged, and the first result is [0, N].
    """
    n, low = len(cond), moved(torch.tensor(levels), e.device)
    final = [flow.interpolate(trajectory.x[-1], e, u.expand(n)) for u in low]
    states, times = (trajectory.x[1:-1], trajectory.t[1:-1]) if with_steps else ((), trajectory.t[:0])
    x, t = torch.cat([*states, *final]), torch.cat([times, low]).repeat_interleave(n)
    whose = torch.arange(len(x)) % n
    parts = micro_batches(len(x), micro_batch_size)
    logits = torch.cat([models.discriminator(x[i], t[i], cond[whose[i]]) for i in parts]).view(-1, n)
    return logits[: -len(low)], logits[-len(low) :].mean(0)


def policy_loss(
    models: DistillationModels,
    trajectory: Trajectory,
    cond: Cond,
    advantage: Tensor,
    coefficients: StepCoefficients,
    clip_range: float,
    projected: bool = False,
) -> tuple[Tensor, Aux]:
    """Clipped policy gradient over the stochastic steps of a trajectory (Flow-GRPO, 2505.05470, Eq. 5), mean over steps. -> [N]

    A rollout serves one update, so the old policy is the student itself and the ratio exactly 1, however passes with and
    without gradient are rounded; the rollout's own log-probability is the check. advantage [K - 1, N]. clip_range > 0. The
    action of step k is the state x[k + 1] or, with `projected`, the part of its noise that changed the next prediction
    (Trajectory.projected_actions). Also returns "ratio_error" [N]: the largest |ratio - 1| of the replay to the rollout.
    """
    total = torch.zeros(len(cond), device=advantage.device)
    error = torch.zeros(len(cond), device=advantage.device)
    actions, old = trajectory.projected_actions(coefficients) if projected else (list(trajectory.x[1:-1]), trajectory.neg_mse)
    for k, action in enumerate(actions):
        step, _ = step_distribution(models.student, trajectory.x[k], trajectory.t[k], trajectory.t[k + 1], cond, coefficients)
        neg_mse = step.neg_mse(action)
        total = total + losses.ppo_clip(neg_mse, neg_mse.detach(), advantage[k], clip_range)
        error = torch.maximum(error, ((neg_mse - old[k]).detach().exp() - 1).abs())
    return total / max(1, len(actions)), {"ratio_error": error}


def forward_policy_loss(
    models: DistillationModels, x0: Tensor, cond: Cond, advantage: Tensor, t: Tensor, e: Tensor
) -> tuple[Tensor, Aux]:
    """Policy gradient on the forward process (after DiffusionNFT, 2509.16117): A / 2 mean |x0(x_t) - x0|^2. -> [N]

    Final images x0 [N, ...] of the student are re-noised to t [N] with noise e [N, ...]. Its prediction there is drawn to
    images with a positive advantage [N] and pushed from those with a negative one. No action, log-probability or ratio is
    needed, so a student of one step can be rewarded too. Where the student has just made the images, the gradient is that of
    DiffusionNFT's loss up to a factor: the student is then its own old policy.
    """
    x = flow.interpolate(x0, e, t)
    prediction = flow.x0_from_velocity(x, models.student(x, t, cond), t)
    return 0.5 * advantage * losses.mean_flat((prediction - x0).float().square()), {}
