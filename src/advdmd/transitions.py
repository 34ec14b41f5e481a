"""Few-step transitions t -> s as Gaussians: mean = (1 - s) x0 + c e, std = d, with x0 and e read off the velocity.

A kernel is the pair (c, d) as a function of (t, s). It keeps the marginal of x_s exactly iff c^2 + d^2 = s^2.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from advdmd import flow

StepCoefficients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def ode(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The Euler step of the probability-flow ODE: no fresh noise."""
    return s, torch.zeros_like(s)


def renoise(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """DMD2's backward simulation (2405.14867, Sec. 4.4): predict x0, add fresh noise."""
    return torch.zeros_like(s), s


def cps(eta: float) -> StepCoefficients:
    """Coefficients-preserving sampling with noise share eta in [0, 1]: 0 is `ode`, 1 is `renoise`.

    Raises ValueError outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: the noise share lies in [0, 1]; 1 re-noises as DMD2 does, 0 is the ODE")
    if eta == 1:  # cos(pi / 2) is not 0 in floating point, and stock schedulers have exactly 0
        return renoise
    return lambda t, s: (s * math.cos(eta * math.pi / 2), s * math.sin(eta * math.pi / 2))


class Gaussian(NamedTuple):
    """Where a hop may land: mean [N, ...], std [N, 1, ...]."""

    mean: Tensor
    std: Tensor

    def sample(self, e: Tensor) -> Tensor:
        return self.mean + self.std * e

    def closeness(self, x: Tensor) -> Tensor:
        """[N] fp32: -mean((x - mean)^2), the log-density per dimension without 1 / (2 std^2) and constants.

        Dividing by 2 std^2 would let the least noisy hop outweigh the others by (s_max / s_min)^2 = 3.2 at 4 steps;
        ratios of this quantity are what the policy turn clips (Flow-GRPO-Fast, DMDR use the same reduction).
        """
        return -(x.float() - self.mean.float()).square().flatten(1).mean(1)


def transition(kernel: StepCoefficients, x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Gaussian:
    """The hop from x at t to s under a kernel, given the velocity v at x. All fp32."""
    x, v = x.float(), v.float()
    c, d = (flow.bcast(a, x) for a in kernel(t, s))
    # With c = 0 the product is skipped, so that re-noising equals stock schedulers to the last bit.
    mean = (1 - flow.bcast(s, x)) * flow.x0_from_velocity(x, v, t)
    return Gaussian(mean if not c.any() else mean + c * flow.noise_from_velocity(x, v, t), d)
