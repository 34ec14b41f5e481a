"""Randomness that belongs to the sample: (seed, step, sample, name) fixes a draw on any rank, batch split or resume.

**Stream names are seeds.** Every number of every result depends on them, so a name is never changed, whatever else is renamed,
and two draws never share one. tests/test_rng.py holds one golden draw of each.
"""

from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advdmd.types import ONE_RANK, Ranks, moved


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by the hash of a key."""
    digest = blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))


class Draw(NamedTuple):
    """What is drawn for a sample: the stream's name, the method that fills a tensor with its arguments, shape and type."""

    name: str
    fill: Callable[..., Any]
    args: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None


class Rng:
    """Named random streams for the N samples of one step.

    Draws are made on the CPU, the same on all machines, then moved to `device`, without waiting for it.

    samples: ids of this rank's samples. Two draws of one name are equal: use a new name for a new draw. draws: what has been
    asked for, in order; `draw_ahead` makes such draws before they are asked for.
    """

    def __init__(
        self, seed: int, step: int, samples: Sequence[int], ranks: Ranks = ONE_RANK, device: torch.device | str = "cpu"
    ):
        self.seed, self.step, self.samples, self.ranks, self.device = seed, step, tuple(samples), ranks, device
        self.draws: list[Draw] = []
        self._ahead: dict[Draw, Tensor] = {}

    def draw_ahead(self, draws: Iterable[Draw]) -> None:
        """Make draws, such as those of an earlier step, so that they are there when they are asked for."""
        self._ahead |= {d: self._made(d) for d in draws}

    def _draw(self, draw: Draw) -> Tensor:
        self.draws.append(draw)
        found = self._ahead.pop(draw, None)
        return self._made(draw) if found is None else found

    def _made(self, draw: Draw) -> Tensor:
        """[N, *shape]: the generator of each sample fills one row."""
        out = torch.empty(len(self.samples), *draw.shape, dtype=draw.dtype)
        for row, sample in zip(out.unbind(), self.samples, strict=True):
            draw.fill(row, *draw.args, generator=generator(self.seed, self.step, sample, draw.name))
        return moved(out, self.device)

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Standard normal draws [N, *shape]."""
        return self._draw(Draw(name, Tensor.normal_, shape=tuple(shape)))

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform draws [N] in [low, high)."""
        return low + (high - low) * self._draw(Draw(name, Tensor.uniform_))

    def integers(self, name: str, low: int, high: int) -> Tensor:
        """Uniform integers [N] in [low, high)."""
        return self._draw(Draw(name, Tensor.random_, (low, high), dtype=torch.long))

    def minibatches(self, name: str, n: int, micro_batch_size: int) -> list[tuple[Tensor, int]]:
        """The samples of all ranks in n random minibatches.

        For each minibatch: the indices [m], on the host, of the samples that this rank has, perhaps none, and how many passes
        of at most `micro_batch_size` samples the rank with the most of them needs.
        """
        local, rank = len(self.samples), self.ranks.rank
        order = torch.randperm(local * self.ranks.world_size, generator=generator(self.seed, self.step, "all", name))
        out: list[tuple[Tensor, int]] = []
        for m in order.chunk(n):
            most = int(torch.bincount(m // local).max())
            out.append((m[m // local == rank] % local, -(-most // micro_batch_size)))
        return out
