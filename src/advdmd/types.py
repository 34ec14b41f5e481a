"""The values that pass between folders: frozen, indexable by sample, movable between devices."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Metrics = dict[str, float]  # log key -> number
StepMetrics = dict[str, float | Tensor]  # log key -> number, or a tensor [] that is still on the device; nan: not measured
Json = dict[str, Any]  # an object of a JSON file


def as_floats(values: Tensor) -> list[float]:
    """The numbers [n] of a tensor. On a GPU the program waits for all that comes before."""
    return values.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Ranks:
    """The processes that share a step's samples, each an equal contiguous slice in order of rank.

    One process is the default.
    """

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Tensor], Tensor] = _identity  # [..., n] of each rank -> [..., world_size n]

    def local_slice(self, n: int) -> range:
        """This rank's indices of n things. Raises ValueError if they cannot be shared equally."""
        if n % self.world_size:
            raise ValueError(f"prompts_per_step={n} cannot be shared by {self.world_size} processes: make it a multiple")
        return range(self.rank * n // self.world_size, (self.rank + 1) * n // self.world_size)


ONE_RANK = Ranks()


def micro_batches(n: int, size: int) -> list[slice]:
    """The indices 0 to n - 1 in parts of at most `size`."""
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def moved(x: Tensor, where: torch.device | torch.dtype | str) -> Tensor:
    """A tensor on another device or of another type; the host does not wait for a GPU that the tensor goes to.

    For Apple's it does: torch may free the source before it is copied there. For CUDA the source is pinned first.
    """
    kind = "" if isinstance(where, torch.dtype) or x.device.type != "cpu" else torch.device(where).type
    return (x.pin_memory() if kind == "cuda" else x).to(where, non_blocking=kind not in ("", "mps"))


Index = Tensor | slice  # of samples; a tensor [n] lies on the host, where masks are read and nothing has to be waited for


def index_on(i: Index, device: torch.device) -> Index:
    """Indices of the host for tensors on a device."""
    return i if isinstance(i, slice) else moved(i, device)


@dataclass(frozen=True)
class Columns:
    """A dataclass whose fields are tensors or Columns with samples along dimension 0, or None."""

    def _map(self, f: Callable[[Any], Any]) -> Self:
        values = {k.name: getattr(self, k.name) for k in fields(self)}
        return type(self)(**{k: None if v is None else f(v) for k, v in values.items()})

    def __getitem__(self, i: Index) -> Self:
        return self._map(lambda v: v[i] if isinstance(v, Columns) else v[index_on(i, v.device)])

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def to(self, where: torch.device | torch.dtype | str) -> Self:
        """The same on another device, or in another floating-point type."""
        return self._map(lambda v: v.to(where) if isinstance(v, Columns) else moved(v, where))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """All parts, one after the other. A field must be None in all of them or in none."""
        columns = {k.name: [getattr(p, k.name) for p in parts] for k in fields(cls)}
        present = {k: v for k, v in columns.items() if v[0] is not None}
        return cls(**{k: type(v[0]).cat(v) if isinstance(v[0], Columns) else torch.cat(v) for k, v in present.items()})


class SourceImage(Protocol):
    """An image that a prompt edits, read when it is needed."""

    @property
    def place(self) -> str:
        """Where the image lies."""
        ...

    @property
    def state(self) -> tuple[object, ...]:
        """What changes when the image does, without reading it."""
        ...

    def read(self) -> bytes:
        """The bytes of its file. Raises OSError or ValueError if they cannot be had."""
        ...

    def load(self, height: int, width: int) -> Image.Image:
        """The image upright, cropped to the ratio and scaled to the size in pixels. Raises ValueError that names the image."""
        ...


@dataclass(frozen=True)
class Edit:
    """A prompt of a model that edits images, and the images that the prompt is about, in their order."""

    prompt: str
    sources: tuple[SourceImage, ...]

    def __str__(self) -> str:
        return self.prompt


Prompt = str | Edit


@dataclass(frozen=True)
class Cond(Columns):
    """Encoded prompts: embeds [N, L, D], pooled [N, P] or None, mask [N, L] (1 = token) or None, always on the CPU, so that
    lengths are known without waiting for a GPU.

    Of models that edit images also: source [N, S, C, h, w], the latents of each prompt's S source images, and null, the
    conditions [N] of the negative prompt with the same images (without `source`), for guidance.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    source: Tensor | None = None
    null: "Cond | None" = None

    def __post_init__(self) -> None:
        if self.mask is not None:
            object.__setattr__(self, "mask", self.mask.cpu())

    def to(self, where: torch.device | torch.dtype | str) -> Self:
        """The same on another device, or in another floating-point type; the mask stays as it is."""
        return replace(super(Cond, replace(self, mask=None)).to(where), mask=self.mask)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """All parts, one after the other. Where there are masks, shorter parts are padded first."""
        longest = max(p.embeds.shape[1] for p in parts)
        return super().cat([p if p.mask is None else p.padded(longest) for p in parts])

    def padded(self, length: int) -> Self:
        """The same with masked zeros up to `length` tokens."""
        assert self.mask is not None
        more = length - self.embeds.shape[1]
        return replace(self, embeds=F.pad(self.embeds, (0, 0, 0, more)), mask=F.pad(self.mask, (0, more)))

    def trimmed(self) -> Self:
        """The same, cut to the longest prompt where masks tell tokens from padding."""
        null = None if self.null is None else self.null.trimmed()
        if self.mask is None:
            return replace(self, null=null)
        longest = max(1, int(self.mask.sum(1).max()))
        return replace(self, embeds=self.embeds[:, :longest], mask=self.mask[:, :longest], null=null)

    def with_null(self, null: "Cond") -> "Cond":
        """[2 N]: the conditions, then for each of them the empty prompt: `null` [1], or the one with the same source image."""
        own = null.repeated(len(self)) if self.null is None else replace(self.null, source=self.source)
        return Cond.cat([replace(self, null=None), own])

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, those of `null` after "null_": what files hold. Inverse of `from_tensors`."""
        own = {k.name: getattr(self, k.name) for k in fields(self) if k.name != "null"}
        null = {} if self.null is None else {f"null_{k}": v for k, v in self.null.tensors().items()}
        return {k: v for k, v in own.items() if v is not None} | null

    @classmethod
    def from_tensors(cls, found: Mapping[str, Tensor]) -> Self:
        """Conditions of the tensors that `tensors` gives; an early version wrote one source image as [N, C, h, w]."""
        null = {k.removeprefix("null_"): v for k, v in found.items() if k.startswith("null_")}
        own = {k: v for k, v in found.items() if not k.startswith("null_")}
        if "source" in own and own["source"].ndim == 4:
            own["source"] = own["source"][:, None]
        return cls(**own, null=cls.from_tensors(null) if null else None)

    def repeated(self, n: int) -> Self:
        """The first condition n times, [n, ...]."""
        return self[torch.zeros(n, dtype=torch.long)]

    def differs(self, other: "Cond") -> Tensor:
        """[N] 1.0 where two batches of N conditions have different embeddings, else 0.0."""
        return (self.embeds != other.embeds).reshape(len(self), -1).any(1).float()


@dataclass(frozen=True)
class Batch(Columns):
    """The samples of one train step.

    cond: conditions of N samples. real_latents [N, C, H, W]: a clean latent of a real image of the same prompt. prompt_index
    [N]: numbers of the samples' prompts, for rewards that read them. mismatched_cond: another prompt of the step for each
    sample; by default the prompt before it in the batch.
    """

    cond: Cond
    real_latents: Tensor
    prompt_index: Tensor | None = None
    mismatched_cond: Cond | None = None
