"""Losses as functions of tensors: one number per sample, in fp32. No networks, no schedules, no randomness."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all but the first dimension, [N, ...] -> [N]."""
    return x.flatten(1).mean(1)


def flow_matching(v: Tensor, x0: Tensor, e: Tensor) -> Tensor:
    """Flow matching (Lipman et al. 2022): mean |v - (e - x0)|^2, all [N, ...] -> [N]."""
    return mean_flat((v.float() - (e - x0).float()).square())


def dmd(x0: Tensor, x0_teacher: Tensor, x0_fake: Tensor) -> Tensor:
    """Distribution matching (DMD, 2311.18828, Eq. 7-8), all [N, ...] -> [N].

    A surrogate whose gradient in x0 is the normalised difference of the two denoisers,
    g = (x0_fake - x0_teacher) / mean|x0 - x0_teacher|, up to 1 / D for the mean over D dimensions.
    """
    x0, x0_teacher, x0_fake = x0.float(), x0_teacher.float(), x0_fake.float()
    with torch.no_grad():
        scale = (x0 - x0_teacher).abs().mean(tuple(range(1, x0.ndim)), keepdim=True).clamp(min=1e-6)
        target = x0 - (x0_fake - x0_teacher) / scale
    return 0.5 * mean_flat((x0 - target).square())


def gan_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Non-saturating GAN loss on raw logits, [N], [N] -> [N]: softplus(-D(real)) + softplus(D(fake)).

    At its optimum D is a log-ratio.
    """
    return F.softplus(-real.float()) + F.softplus(fake.float())


def gan_mismatched_caption(logit: Tensor) -> Tensor:
    """A real image under a mismatched caption counts as generated (matching-aware, Reed et al. 2016), [N] -> [N]."""
    return F.softplus(logit.float())


def gan_generator(fake: Tensor) -> Tensor:
    """The generator's GAN loss on raw logits, [N] -> [N]: softplus(-D(fake)) (DMD2, 2405.14867, Eq. 4)."""
    return F.softplus(-fake.float())


def group_advantage(reward: Tensor, group_size: int, limit: float = 5.0) -> Tensor:
    """Group-relative advantage: the reward minus its group's mean, over the std of *all* groups, clipped to +-limit.

    reward [K, P * group_size], groups contiguous, -> same shape. A std per group would scale a group without a signal up to
    unit size (the bias that Dr. GRPO, 2503.20783, describes), so the std is pooled over the groups of each step.
    Raises ValueError if the number of samples is not a multiple of group_size.
    """
    if reward.shape[-1] % group_size:
        raise ValueError(f"group_size={group_size}: {reward.shape[-1]} samples are not a multiple of it")
    grouped = reward.float().reshape(*reward.shape[:-1], -1, group_size)
    centred = (grouped - grouped.mean(-1, keepdim=True)).reshape(reward.shape)
    return (centred / centred.std(-1, keepdim=True).clamp(min=1e-6)).clamp(-limit, limit)


def within_group_std(x: Tensor, group_size: int) -> Tensor:
    """Standard deviation within groups of `group_size` samples, mean over groups and dimensions, [N, ...] -> [].

    0 means that every prompt gives one image.
    """
    grouped = x.float().reshape(-1, group_size, *x.shape[1:])
    return grouped.std(1).mean()


def auc_gate(auc: Tensor, low: float = 0.55, width: float = 0.10) -> Tensor:
    """How far a discriminator's reward is trusted, [K] -> [K] in [0, 1]: clip((AUC - low) / width, 0, 1).

    A multiplier, never a branch.
    """
    return ((auc - low) / width).clamp(0, 1)


def gated_advantage(by_step: Tensor, final: Tensor, gate: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Advantages of steps [K - 1, N] and of final images [1, N] under the gates of K levels [K], and the mean gate [].

    share in [0, 1]: of the final image in a step's credit.
    """
    advantage = (1 - share) * by_step * gate[:-1, None] + share * final * gate[-1]
    return advantage, (1 - share) * gate[:-1].mean() + share * gate[-1]


def ppo_clip(neg_mse: Tensor, neg_mse_old: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """PPO's clipped surrogate (Schulman et al. 2017, Eq. 7) on transitions.Gaussian.neg_mse, all [N] -> [N]. clip_range > 0."""
    ratio = (neg_mse.float() - neg_mse_old.float()).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


def auc(real: Tensor, fake: Tensor, at: Tensor) -> Tensor:
    """Probability that a real logit exceeds a generated one, ties count half, of samples [N] where `at` [N] is true. -> []

    .5: blind, 1: separated; nan if `at` is true nowhere.
    """
    d, pairs = real.float()[:, None] - fake.float()[None], at[:, None] & at[None]
    higher = ((d > 0) & pairs).sum() + 0.5 * ((d == 0) & pairs).sum()
    return higher / pairs.sum()
