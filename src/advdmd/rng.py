"""Randomness that belongs to the sample: (seed, step, sample, name) fixes a draw on any rank, batch split or resume.

**Stream names are seeds.** Every number of every result depends on them, so a name is never changed, whatever else is renamed,
and two draws never share one. tests/test_rng.py holds one golden draw of each.
"""

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


class Rng:
    """Named random streams for the N samples of one step.

    Draws are made on the CPU, the same on all machines, then moved to `device`.

    samples: ids of this rank's samples. Two draws of one name are equal: use a new name for a new draw.
    """

    def __init__(
        self, seed: int, step: int, samples: Sequence[int], ranks: Ranks = ONE_RANK, device: torch.device | str = "cpu"
    ):
        self.seed, self.step, self.samples, self.ranks, self.device = seed, step, tuple(samples), ranks, device

    def _draw(
        self, name: str, fill: Callable[..., Any], *args: int, shape: Sequence[int] = (), dtype: torch.dtype | None = None
    ) -> Tensor:
        """[N, *shape]: the generator of each sample fills one row."""
        out = torch.empty(len(self.samples), *shape, dtype=dtype)
        for row, sample in zip(out.unbind(), self.samples, strict=True):
            fill(row, *args, generator=generator(self.seed, self.step, sample, name))
        return out.to(self.device)

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Standard normal draws [N, *shape]."""
        return self._draw(name, Tensor.normal_, shape=shape)

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform draws [N] in [low, high)."""
        return low + (high - low) * self._draw(name, Tensor.uniform_)

    def integers(self, name: str, low: int, high: int) -> Tensor:
        """Uniform integers [N] in [low, high)."""
        return self._draw(name, Tensor.random_, low, high, dtype=torch.long)

    def minibatches(self, name: str, n: int, micro_batch_size: int) -> list[tuple[Tensor, int]]:
        """The samples of all ranks in n random minibatches.

        For each minibatch: the indices [m] of the samples that this rank has, perhaps none, and how many passes of at most
        `micro_batch_size` samples the rank with the most of them needs.
        """
        local, rank = len(self.samples), self.ranks.rank
        order = torch.randperm(local * self.ranks.world_size, generator=generator(self.seed, self.step, "all", name))
        out: list[tuple[Tensor, int]] = []
        for m in order.chunk(n):
            most = int(torch.bincount(m // local).max())
            out.append(((m[m // local == rank] % local).to(self.device), -(-most // micro_batch_size)))
        return out
