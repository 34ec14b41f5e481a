"""Rectified flow: x_t = (1 - t) x0 + t e and v = dx_t/dt = e - x0. Data sits at t = 0, noise at t = 1.

Everywhere below x, x0, e, v are [N, ...] and t, s, u are [N] in [0, 1].
"""

import torch
from torch import Tensor

MAX_STEPS = 1000  # steps of a grid: as many times as stock schedulers know


def bcast(t: Tensor, x: Tensor) -> Tensor:
    """[N] -> [N, 1, ...] with as many dimensions as x."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def interpolate(x0: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """The state between data and noise: x_t = (1 - t) x0 + t e."""
    t = bcast(t, x0)
    return (1 - t) * x0 + t * e


def x0_from_velocity(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The data a velocity points back to: x0 = x - t v."""
    return x - bcast(t, x) * v


def noise_from_velocity(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The noise a velocity points forward to: e = x + (1 - t) v."""
    return x + (1 - bcast(t, x)) * v


def guide(v: Tensor, v_null: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, Eq. 6 with scale = 1 + w): v_null + scale (v - v_null)."""
    return v_null + scale * (v - v_null)


def shift(t: Tensor, a: float) -> Tensor:
    """Time shift of SD3 (Esser et al. 2024, Eq. 23): t <- a t / (1 + (a - 1) t); a > 1 spends time at high noise."""
    return a * t / (1 + (a - 1) * t)


def grid(steps: int, a: float = 1.0) -> Tensor:
    """[steps + 1] times from 1 to 0, shifted; grid(4, 3) = 1, .9, .75, .5, 0. Raises ValueError unless steps lie
    in [1, MOST] and a > 0."""
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps={steps}: a grid needs at least one step, and at most {MAX_STEPS}")
    if a <= 0:
        raise ValueError(f"shift={a}: the time shift must be positive (SD3 uses 3)")
    return shift(torch.linspace(1, 0, steps + 1, device=torch.get_default_device()), a)


def twinflow_grid(steps: int, gap: float) -> Tensor:
    """[steps + 1] times of TwinFlow's sampler (2512.05150): 1 - linspace(.001, 1 - gap, steps), then 0; one step: .999, 0.

    Raises ValueError if steps are outside [1, MOST] or gap, the last time before 0, outside (0, .999).
    """
    if not 1 <= steps <= MAX_STEPS or not 0 < gap < 0.999:
        raise ValueError(f"steps={steps}, gap={gap}: 1 to {MAX_STEPS} steps, and a last time before 0 inside (0, .999)")
    home = torch.get_default_device()  # said, as a library that patches linspace makes it forget
    return torch.cat([1 - torch.linspace(0.001, 1 - gap, steps, device=home), torch.zeros(1, device=home)])


def logit_normal(e: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Training times of SD3 (Esser et al. 2024, Eq. 19) from standard normal draws e [N]."""
    return torch.sigmoid(mean + std * e)
