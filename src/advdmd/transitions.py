"""Few-step transitions t -> s as Gaussians: mean = (1 - s) x0 + c e, std = d, where x0 and e are read off the velocity.

A sampler is a pair of coefficients (c, d), a function of (t, s). It keeps the marginal distribution of x_s exactly if and only
if c^2 + d^2 = s^2.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from advdmd import flow

StepCoefficients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (t [N], s [N]) -> (c [N], d [N])


def ode(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (c [N], d [N]) of the Euler step from t [N] to s [N] of the probability-flow ODE: no fresh noise."""
    return s, torch.zeros_like(s)


def renoise(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (c [N], d [N]) of DMD2's backward simulation from t [N] to s [N] (2405.14867, Sec. 4.4).

    Predict x0, add fresh noise.
    """
    return torch.zeros_like(s), s


def cps(eta: float) -> StepCoefficients:
    """Coefficients-preserving sampling with the noise share eta in [0, 1]; 0 is `ode`, 1 is `renoise`.

    Raises ValueError if eta is outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: the noise share lies in [0, 1]; 1 re-noises as DMD2 does, 0 is the ODE")
    if eta == 1:  # cos(pi / 2) is not 0 in floating point, and stock schedulers have exactly 0
        return renoise
    return lambda t, s: (s * math.cos(eta * math.pi / 2), s * math.sin(eta * math.pi / 2))


class Gaussian(NamedTuple):
    """The distribution of a transition's next state: mean [N, ...], std [N, 1, ...]."""

    mean: Tensor
    std: Tensor

    def sample(self, e: Tensor) -> Tensor:
        """The state mean + std e [N, ...] for standard normal noise e [N, ...]."""
        return self.mean + self.std * e

    def neg_mse(self, x: Tensor) -> Tensor:
        """-mean((x - mean)^2) in fp32, x [N, ...] -> [N]: the log-density per dimension without 1 / (2 std^2) and constants.

        Dividing by 2 std^2 would let the least noisy transition outweigh the others by (s_max / s_min)^2 = 3.2 at 4 steps. The
        policy loss clips ratios of this quantity (Flow-GRPO-Fast and DMDR use the same reduction).
        """
        return -(x.float() - self.mean.float()).square().flatten(1).mean(1)


def transition(coefficients: StepCoefficients, x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Gaussian:
    """The distribution of the state at s [N] after x [N, ...] at t [N], given the velocity v [N, ...] at x. All in fp32."""
    x, v = x.float(), v.float()
    c, d = (flow.bcast(a, x) for a in coefficients(t, s))
    mean = (1 - flow.bcast(s, x)) * flow.x0_from_velocity(x, v, t)
    # Re-noising has c = 0. Whether c is 0 is not asked of the device, which would have to be waited for.
    return Gaussian(mean if coefficients is renoise else mean + c * flow.noise_from_velocity(x, v, t), d)
