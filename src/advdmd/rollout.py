"""Rollouts: a few-step student follows its grid from noise to an image and leaves a trajectory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from advdmd import flow
from advdmd.rng import Rng
from advdmd.transitions import Gaussian, StepCoefficients, ode, transition
from advdmd.types import Cond, Index, index_on, micro_batches


class Velocity(Protocol):
    """A flow model: (x [N, ...], t [N], cond [N]) -> v [N, ...]."""

    def __call__(self, x: Tensor, t: Tensor, cond: Cond, /) -> Tensor: ...


@dataclass(frozen=True)
class Trajectory:
    """A few-step trajectory of N samples.

    x [K + 1, N, ...]: states at times t [K + 1], noise first. x0 [K, N, ...]: the student's clean prediction at each state;
    x0[-1] is the final image. neg_mse [K - 1, N]: -mean((x[k + 1] - mean_k)^2) of each stochastic step, the log-density up to
    scale and constants. The last step is deterministic and has none.
    """

    x: Tensor
    t: Tensor
    x0: Tensor
    neg_mse: Tensor

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.t) - 1

    def at(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """State [N, ...] and time [N] of each sample at its own index k [N] in [0, K]."""
        return self.x[k, torch.arange(len(k), device=k.device)], self.t[k]

    def x0_at(self, k: Tensor) -> Tensor:
        """The clean prediction [N, ...] of each sample at its own step k [N] in [0, K - 1]."""
        return self.x0[k, torch.arange(len(k), device=k.device)]

    def projected_actions(self, coefficients: StepCoefficients) -> tuple[list[Tensor], Tensor]:
        """Actions restricted to the directions that change the image: K - 1 tensors [N, ...] and their neg_mse [K - 1, N].

        Step k adds white noise std_k e, but the next prediction responds only along
        J = (1 - t[k + 1]) std_k d x0[k + 1] / d x[k + 1]. So instead of x[k + 1] the policy loss scores
        a_k = mean_k + (1 - t[k + 1]) (x0[k + 1] - x0[k]), about mean_k + J e. At the first step, from one start, the expected
        gradient is J J^T times the reward's instead of J^T, with less variance. Elsewhere it is biased and no policy gradient:
        the change of the mean, E[x0[k + 1]] - x0[k], is credited as well where it varies with the reward, as it does from
        starts of their own and at every later step (measured, docs/log.md, 2026-11-27).
        """
        actions: list[Tensor] = []
        neg_mse: list[Tensor] = []
        for k in range(self.num_steps - 1):
            t, s = self.t[k].expand(self.x.shape[1]), self.t[k + 1].expand(self.x.shape[1])
            v = (self.x[k] - self.x0[k]) / flow.bcast(t, self.x[k])
            step = transition(coefficients, self.x[k], v, t, s)
            actions.append(step.mean + (1 - flow.bcast(s, self.x[k])) * (self.x0[k + 1] - self.x0[k]))
            neg_mse.append(step.neg_mse(actions[-1]))
        return actions, torch.stack(neg_mse) if neg_mse else self.neg_mse

    @classmethod
    def cat(cls, parts: Sequence["Trajectory"]) -> "Trajectory":
        """The samples of several trajectories along one grid."""
        if len(parts) == 1:
            return parts[0]
        x, x0, neg_mse = (torch.cat(column, 1) for column in zip(*((p.x, p.x0, p.neg_mse) for p in parts), strict=True))
        return cls(x, parts[0].t, x0, neg_mse)

    def __getitem__(self, i: Index) -> "Trajectory":
        i = index_on(i, self.x.device)
        return Trajectory(self.x[:, i], self.t, self.x0[:, i], self.neg_mse[:, i])


def step_distribution(
    velocity: Velocity, x: Tensor, t: Tensor, s: Tensor, cond: Cond, coefficients: StepCoefficients
) -> tuple[Gaussian, Tensor]:
    """One step of a student from x [N, ...] at t [] to s [].

    The distribution of the next state, and the prediction x0 [N, ...].
    """
    t, s = t.expand(len(x)), s.expand(len(x))
    v = velocity(x, t, cond)
    return transition(coefficients, x, v, t, s), flow.x0_from_velocity(x, v, t)


@torch.no_grad()
def rollout(
    velocity: Velocity,
    cond: Cond,
    noise: Tensor,
    grid: Tensor,
    coefficients: StepCoefficients,
    micro_batch_size: int | None = None,
) -> Trajectory:
    """Backward simulation: the trajectory of N samples, without gradient.

    noise [K, N, ...] standard normal: noise[0] is the initial state, noise[k] enters step k - 1. grid [K + 1]: times from 1 to
    0. micro_batch_size: samples per forward pass, by default all.
    """
    n = noise.shape[1]
    parts = micro_batches(n, micro_batch_size or n)
    return Trajectory.cat([_rollout(velocity, cond[i], noise[:, i], grid, coefficients) for i in parts])


def _rollout(velocity: Velocity, cond: Cond, noise: Tensor, grid: Tensor, coefficients: StepCoefficients) -> Trajectory:
    x = noise[0]
    states: list[Tensor] = [x]
    predictions: list[Tensor] = []
    neg_mse: list[Tensor] = []
    for k in range(len(grid) - 1):
        last = k == len(grid) - 2  # the step to 0 has no noise, whatever the coefficients are
        step, x0 = step_distribution(velocity, x, grid[k], grid[k + 1], cond, ode if last else coefficients)
        x = step.mean if last else step.sample(noise[k + 1])
        if not last:
            neg_mse.append(step.neg_mse(x))
        states.append(x)
        predictions.append(x0)
    none = x.new_zeros(0, len(x))
    return Trajectory(torch.stack(states), grid, torch.stack(predictions), torch.stack(neg_mse) if neg_mse else none)


def sample_exit_steps(rng: Rng, name: str, num_steps: int) -> Tensor:
    """Steps [N] in [0, num_steps) at which a trajectory's prediction is used.

    The larger of two uniform draws, P(k) = (2 k + 1) / K^2.

    One fake score serves all steps. With uniform draws the blurred first predictions would take a share of its capacity that
    the final image then lacks; drawn less often, they are still trained.
    """
    return torch.maximum(rng.integers(name, 0, num_steps), rng.integers(f"{name}/2", 0, num_steps))


@torch.no_grad()
def sample_euler(velocity: Velocity, cond: Cond, noise: Tensor, grid: Tensor) -> Tensor:
    """The plain Euler sampler of a teacher: noise [N, ...] along grid [K + 1] -> x0 [N, ...]."""
    x = noise
    for k in range(len(grid) - 1):
        x = x + (grid[k + 1] - grid[k]) * velocity(x, grid[k].expand(len(x)), cond)
    return x
