"""Walking a few-step student along its own grid, and the path it leaves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advdmd import flow
from advdmd.rng import Rng
from advdmd.transitions import Gaussian, StepCoefficients, ode, transition

Velocity = Callable[[Tensor, Tensor, Any], Tensor]  # (x [N, ...], t [N], cond [N]) -> v [N, ...]


@dataclass(frozen=True)
class Trajectory:
    """x[k] lives at time t[k], from where the student saw x0[k]; hop k -> k + 1 landed close[k] to its mean."""

    x: Tensor  # [K + 1, N, ...]
    t: Tensor  # [K + 1]
    x0: Tensor  # [K, N, ...]; x0[K - 1] is x[K], the image
    close: Tensor  # [K - 1, N]: the last hop is deterministic and has none

    @property
    def hops(self) -> int:
        return len(self.t) - 1

    def at(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """State and time of each sample at its own index k [N]."""
        return self.x[k, torch.arange(len(k))], self.t[k]

    def sights(self, kernel: StepCoefficients) -> tuple[list[Tensor], Tensor]:
        """The noise of hops 0..K-2 as the next hop understood it: [N, ...] each, and their closeness [K - 1, N].

        A hop's noise is white, but the image changes only along the few directions J in which the next x0 answers to it. So
        the action mean + (1 - s) (x0[k + 1] - x0[k]), about mean + J e, stands in for mean + std e. For samples of one start
        its expected gradient is J J^T of the reward's instead of J^T, without the variance of all the other directions.
        Samples of a group start from noises of their own, so what the next hop adds on average, E[x0[k + 1]] - x0[k], is
        credited too where it varies with the reward: a bias, accepted because it was measured to climb (docs/log.md).
        """
        actions: list[Tensor] = []
        close: list[Tensor] = []
        for k in range(self.hops - 1):
            t, s = self.t[k].expand(self.x.shape[1]), self.t[k + 1].expand(self.x.shape[1])
            landed = transition(kernel, self.x[k], (self.x[k] - self.x0[k]) / flow.bcast(t, self.x[k]), t, s)
            actions.append(landed.mean + (1 - flow.bcast(s, self.x[k])) * (self.x0[k + 1] - self.x0[k]))
            close.append(landed.closeness(actions[-1]))
        return actions, torch.stack(close) if close else self.close

    @classmethod
    def cat(cls, paths: Sequence["Trajectory"]) -> "Trajectory":
        """The samples of several paths along one grid."""
        if len(paths) == 1:
            return paths[0]
        x, x0, close = (torch.cat(parts, 1) for parts in zip(*((p.x, p.x0, p.close) for p in paths), strict=True))
        return cls(x, paths[0].t, x0, close)

    def __getitem__(self, i: Tensor) -> "Trajectory":
        return Trajectory(self.x[:, i], self.t, self.x0[:, i], self.close[:, i])


def step_distribution(
    velocity: Velocity, x: Tensor, t: Tensor, s: Tensor, cond: Any, kernel: StepCoefficients
) -> tuple[Gaussian, Tensor]:
    """The Gaussian a student hops by from x at t (scalar) to s (scalar), to s = 0 without noise; and the x0 it saw."""
    t, s = t.expand(len(x)), s.expand(len(x))
    v = velocity(x, t, cond)
    return transition(kernel if s[0] > 0 else ode, x, v, t, s), flow.x0_from_velocity(x, v, t)


def rollout(
    velocity: Velocity, cond: Any, noise: Tensor, grid: Tensor, kernel: StepCoefficients, micro: int | None = None
) -> Trajectory:
    """Sample K = len(grid) - 1 hops. noise [K, N, ...]: the start, then one fresh draw for every hop but the last.

    `micro` samples go at a time, as in what replays the path: less memory, and the same numbers in low precision.
    """
    n = noise.shape[1]
    parts = (slice(i, i + (micro or n)) for i in range(0, n, micro or n))
    return Trajectory.cat([_rollout(velocity, cond[i], noise[:, i], grid, kernel) for i in parts])


@torch.no_grad()
def _rollout(velocity: Velocity, cond: Any, noise: Tensor, grid: Tensor, kernel: StepCoefficients) -> Trajectory:
    x = noise[0]
    states: list[Tensor] = [x]
    seen: list[Tensor] = []
    close: list[Tensor] = []
    for k in range(len(grid) - 1):
        g, x0 = step_distribution(velocity, x, grid[k], grid[k + 1], cond, kernel)
        last = k == len(grid) - 2
        x = g.mean if last else g.sample(noise[k + 1])
        if not last:
            close.append(g.closeness(x))
        states.append(x)
        seen.append(x0)
    return Trajectory(torch.stack(states), grid, torch.stack(seen), torch.stack(close) if close else x.new_zeros(0, len(x)))


def sample_exit_steps(rng: Rng, name: str, hops: int) -> Tensor:
    """[N] hops to leave a path at: the larger of two uniform draws, so P(k) = (2 k + 1) / hops^2.

    One fake score serves all exits. Drawn evenly, the blurred first exits would take a share of it that the final image
    then has to make up for; half as often, they are still trained.
    """
    return torch.maximum(rng.index(name, 0, hops), rng.index(f"{name}/2", 0, hops))


@torch.no_grad()
def sample_euler(velocity: Velocity, cond: Any, noise: Tensor, grid: Tensor) -> Tensor:
    """The plain Euler sampler a teacher uses: noise [N, ...] -> x0 [N, ...]."""
    x = noise
    for k in range(len(grid) - 1):
        x = x + (grid[k + 1] - grid[k]) * velocity(x, grid[k].expand(len(x)), cond)
    return x
