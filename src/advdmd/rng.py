"""Randomness that belongs to the sample: (seed, step, sample, name) fixes a draw on any rank, batch split or resume."""

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from advdmd.types import ONE_RANK, Ranks


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by the hash of a key."""
    digest = blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))


def to_default_device(drawn: Tensor) -> Tensor:
    """What was drawn, which happens on the CPU so that all machines draw the same, where tensors are made by default."""
    return drawn.to(torch.get_default_device())


class Rng:
    """Named streams for the samples of one step. Two draws of one name are equal; use a new name for a new draw."""

    def __init__(self, seed: int, step: int, samples: Sequence[int], team: Ranks = ONE_RANK):
        self.seed, self.step, self.samples, self.team = seed, step, tuple(samples), team

    def _drawn(self, name: str, fill: Callable[..., Any], *at: int, shape: Sequence[int] = (), dtype: Any = None) -> Tensor:
        """[N, *shape] of which every sample's generator fills its row."""
        out = torch.empty(len(self.samples), *shape, dtype=dtype, device="cpu")
        for row, sample in zip(out.unbind(), self.samples, strict=True):
            fill(row, *at, generator=generator(self.seed, self.step, sample, name))
        return to_default_device(out)

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """[N, *shape] standard normal."""
        return self._drawn(name, Tensor.normal_, shape=shape)

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """[N] uniform in [low, high)."""
        return low + (high - low) * self._drawn(name, Tensor.uniform_)

    def index(self, name: str, low: int, high: int) -> Tensor:
        """[N] integers in [low, high)."""
        return self._drawn(name, Tensor.random_, low, high, dtype=torch.long)

    def minibatches(self, name: str, n: int, micro: int) -> list[tuple[Tensor, int]]:
        """The step's samples, all processes', in n random minibatches: of each the indices of those that are here, perhaps
        none, and how many passes of `micro` samples the process with most of them needs."""
        here = len(self.samples)
        g = generator(self.seed, self.step, "all", name)
        order = torch.randperm(here * self.team.size, generator=g, device="cpu")
        out: list[tuple[Tensor, int]] = []
        for m in order.chunk(n):
            most = int(torch.bincount(m // here).max())
            out.append((to_default_device(m[m // here == self.team.rank] % here), -(-most // micro)))
        return out
