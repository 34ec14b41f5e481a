"""Objectives as functions of tensors: one number per sample, fp32. No networks, no schedules, no randomness."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_flat(x: Tensor) -> Tensor:
    """[N, ...] -> [N], mean over all but the first dimension."""
    return x.flatten(1).mean(1)


def flow_matching(v: Tensor, x0: Tensor, e: Tensor) -> Tensor:
    """Flow matching (Lipman et al. 2022): mean |v - (e - x0)|^2. -> [N]"""
    return mean_flat((v.float() - (e - x0).float()).square())


def dmd(x0: Tensor, x0_teacher: Tensor, x0_fake: Tensor) -> Tensor:
    """Distribution matching (DMD, 2311.18828, Eq. 7-8): a surrogate whose gradient in x0 is the normalised difference

    g = (x0_fake - x0_teacher) / mean|x0 - x0_teacher| of the two denoisers, up to 1 / D for the mean. -> [N]
    """
    x0, x0_teacher, x0_fake = x0.float(), x0_teacher.float(), x0_fake.float()
    with torch.no_grad():
        scale = (x0 - x0_teacher).abs().mean(tuple(range(1, x0.ndim)), keepdim=True).clamp(min=1e-6)
        target = x0 - (x0_fake - x0_teacher) / scale
    return 0.5 * mean_flat((x0 - target).square())


def gan_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Non-saturating GAN loss on raw logits: softplus(-D(real)) + softplus(D(fake)); at its optimum D is a log-ratio."""
    return F.softplus(-real.float()) + F.softplus(fake.float())


def gan_mismatched_caption(wrong: Tensor) -> Tensor:
    """A real image under a wrong caption is a fake (matching-aware discriminator, Reed et al. 2016). -> [N]"""
    return F.softplus(wrong.float())


def gan_generator(fake: Tensor) -> Tensor:
    """The generator's side of the GAN: softplus(-D(fake)) (DMD2, 2405.14867, Eq. 4). -> [N]"""
    return F.softplus(-fake.float())


def group_advantage(reward: Tensor, group: int, limit: float = 5.0) -> Tensor:
    """Group-relative advantage: reward minus its group's mean, over the std of *all* groups, clipped to +-limit.

    reward [K, P * group], groups contiguous -> same shape. A std per group would blow a group without a signal up to
    unit size (the bias Dr. GRPO, 2503.20783, describes), so the spread is pooled per hop.
    Raises ValueError if the groups do not fit.
    """
    if reward.shape[-1] % group:
        raise ValueError(f"group={group}: {reward.shape[-1]} samples are not a multiple of it")
    grouped = reward.float().reshape(*reward.shape[:-1], -1, group)
    centred = (grouped - grouped.mean(-1, keepdim=True)).reshape(reward.shape)
    return (centred / centred.std(-1, keepdim=True).clamp(min=1e-6)).clamp(-limit, limit)


def within_group_std(x: Tensor, group: int) -> Tensor:
    """How far apart images of one prompt are: the standard deviation within groups of `group`, mean over all dimensions.
    0: a prompt gives one image. [N, ...] -> []"""
    grouped = x.float().reshape(-1, group, *x.shape[1:])
    return grouped.std(1).mean()


def auc_gate(auc: Tensor, low: float = 0.55, width: float = 0.10) -> Tensor:
    """How far a critic may be believed, in [0, 1]: clip((AUC - low) / width, 0, 1). A multiplier, never a branch."""
    return ((auc - low) / width).clamp(0, 1)


def ppo_clip(close: Tensor, close_old: Tensor, gain: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate (Schulman et al. 2017, Eq. 7) on closeness (kernels.Gaussian.closeness). All [N] -> [N]"""
    ratio = (close.float() - close_old.float()).exp()
    return -torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)


def auc(real: Tensor, fake: Tensor) -> Tensor:
    """Probability that a real logit exceeds a fake one, ties half: .5 is blind, 1 is separated. [N], [M] -> []"""
    d = real.float()[:, None] - fake.float()[None]
    return (d > 0).float().mean() + 0.5 * (d == 0).float().mean()
