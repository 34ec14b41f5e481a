"""Rectified flow: x_t = (1 - t) x0 + t e and v = dx_t/dt = e - x0. Data is at t = 0, noise at t = 1.

In every function x, x0, e and v are [N, ...]; t, s and u are [N] in [0, 1].
"""

import torch
from torch import Tensor

MAX_STEPS = 1000  # of a grid: stock schedulers know as many times


def bcast(t: Tensor, x: Tensor) -> Tensor:
    """Times t [N] as [N, 1, ...], with as many dimensions as x [N, ...]."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def interpolate(x0: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """The state between data x0 [N, ...] and noise e [N, ...] at t [N]: x_t = (1 - t) x0 + t e, [N, ...]."""
    t = bcast(t, x0)
    return (1 - t) * x0 + t * e


def x0_from_velocity(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The data [N, ...] that the velocity v [N, ...] at x [N, ...] and t [N] points back to: x0 = x - t v."""
    return x - bcast(t, x) * v


def noise_from_velocity(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The noise [N, ...] that the velocity v [N, ...] at x [N, ...] and t [N] points forward to: e = x + (1 - t) v."""
    return x + (1 - bcast(t, x)) * v


def guide(v: Tensor, v_null: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance of velocities [N, ...].

    v_null + scale (v - v_null) (Ho & Salimans 2022, Eq. 6, scale = 1 + w).
    """
    return v_null + scale * (v - v_null)


def shift(t: Tensor, a: float) -> Tensor:
    """Time shift of SD3 (Esser et al. 2024, Eq. 23), t [N] -> [N]: t <- a t / (1 + (a - 1) t).

    With a > 1 more steps are at high noise.
    """
    return a * t / (1 + (a - 1) * t)


def grid(steps: int, a: float = 1.0, device: torch.device | str = "cpu") -> Tensor:
    """Times [steps + 1] from 1 to 0, shifted by a; grid(4, 3) = 1, .9, .75, .5, 0.

    Raises ValueError unless steps is in [1, MAX_STEPS] and a > 0.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps={steps}: a grid needs at least one step, and at most {MAX_STEPS}")
    if a <= 0:
        raise ValueError(f"shift={a}: the time shift must be positive (SD3 uses 3)")
    return shift(torch.linspace(1, 0, steps + 1, device=device), a)


def twinflow_grid(steps: int, last_time: float, device: torch.device | str = "cpu") -> Tensor:
    """Times [steps + 1] of TwinFlow's sampler (2512.05150): 1 - linspace(.001, 1 - last_time, steps), then 0.

    One step: .999, 0.

    Raises ValueError unless steps is in [1, MAX_STEPS] and last_time, the last time before 0, is in (0, .999).
    """
    if not 1 <= steps <= MAX_STEPS or not 0 < last_time < 0.999:
        raise ValueError(
            f"steps={steps}, last_time={last_time}: 1 to {MAX_STEPS} steps, and a last time before 0 inside (0, .999)"
        )
    return torch.cat([1 - torch.linspace(0.001, 1 - last_time, steps, device=device), torch.zeros(1, device=device)])


def logit_normal(e: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Training times [N] of SD3 (Esser et al. 2024, Eq. 19) from standard normal draws e [N]: sigmoid(mean + std e)."""
    return torch.sigmoid(mean + std * e)
