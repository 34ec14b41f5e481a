"""The few values that travel between floors: frozen, indexable by sample, movable."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

Metrics = dict[str, float]


def _alone(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Ranks:
    """The processes that share a step's samples, each an equal run of them in order of rank; one process is a team too."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Tensor], Tensor] = _alone  # [..., n] of each -> [..., size n]

    def share(self, n: int) -> range:
        """Which of n things are this process's. Raises ValueError if they cannot be shared equally."""
        if n % self.size:
            raise ValueError(f"prompts_per_step={n} cannot be shared by {self.size} processes: make it a multiple")
        return range(self.rank * n // self.size, (self.rank + 1) * n // self.size)


ONE_RANK = Ranks()


@dataclass(frozen=True)
class _Columns:
    """Fields are tensors with samples along dimension 0, or None."""

    def _map(self, f: Any) -> Self:
        values = {k.name: getattr(self, k.name) for k in fields(self)}
        return type(self)(**{k: None if v is None else f(v) for k, v in values.items()})

    def __getitem__(self, i: Tensor | slice) -> Self:
        return self._map(lambda v: v[i])

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def to(self, *args: Any) -> Self:
        return self._map(lambda v: v.to(*args))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """All parts, one after the other; a field must be None in all of them or in none."""
        columns = {k.name: [getattr(p, k.name) for p in parts] for k in fields(cls)}
        return cls(**{k: None if v[0] is None else torch.cat(v) for k, v in columns.items()})


@dataclass(frozen=True)
class Cond(_Columns):
    """Encoded prompts: embeds [N, L, D], pooled [N, P] or None, mask [N, L] (1 = token) or None."""

    embeds: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """As for any columns; where masks say what is a token, shorter parts are padded first."""
        longest = max(p.embeds.shape[1] for p in parts)
        return super().cat([p if p.mask is None else p.padded(longest) for p in parts])

    def padded(self, length: int) -> Self:
        """With masked zeros up to `length` tokens."""
        assert self.mask is not None
        more = length - self.embeds.shape[1]
        return replace(self, embeds=F.pad(self.embeds, (0, 0, 0, more)), mask=F.pad(self.mask, (0, more)))


def cat_conds(conds: Sequence[Any]) -> Any:
    """Batches of conditions as one; a toy world's are plain tensors [N, ...]."""
    return torch.cat(list(conds)) if isinstance(conds[0], Tensor) else type(conds[0]).cat(conds)


def conds_differ(a: Any, b: Any) -> Tensor:
    """[N] 1 where two conditions differ, 0 where they are the same; a toy world's conditions are plain tensors [N, ...]."""
    a, b = (c.embeds if isinstance(c, Cond) else c for c in (a, b))
    return (a != b).reshape(len(a), -1).any(1).float()


@dataclass(frozen=True)
class Batch(_Columns):
    """What one step is given: `cond` of every sample, and a clean latent of a real image of the same prompt; `prompt` [N]
    numbers the samples' prompts, for rewards that read them; `other`: another prompt of the step for each sample, by
    default the one before in the batch."""

    cond: Any
    real: Tensor
    prompt: Tensor | None = None
    other: Any = None
