"""Images of several shapes: sizes of about one area, a cache for each, one size a step."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from advdmd.data.embedding_cache import EmbeddingCache, bucket_names
from advdmd.data.loader import BatchFn
from advdmd.rng import generator
from advdmd.types import Batch, Cond

RATIOS = (1.0, 5 / 4, 4 / 3, 3 / 2, 16 / 9)  # of the longer side to the shorter
Size = tuple[int, int]  # height, width in pixels


def bucket_sizes(resolution: int, unit: int) -> list[Size]:
    """A square of side `resolution` and about as large rectangles, lying and standing, sides multiples of `unit`."""
    found = []
    for ratio in RATIOS:
        long, short = (max(unit, round(resolution * f / unit) * unit) for f in (math.sqrt(ratio), math.sqrt(1 / ratio)))
        found += [(short, long), (long, short)]
    return sorted(set(found))


def nearest_bucket(choices: Sequence[Size], size: Size) -> Size:
    """The choice whose shape is most like that of an image."""
    shape = lambda s: math.log(s[1] / s[0])  # noqa: E731
    return min(choices, key=lambda s: abs(shape(s) - shape(size)))


def bucket_name(size: Size) -> str:
    """A bucket's folder: "832x1216", height first."""
    return f"{size[0]}x{size[1]}"


class BucketedCache:
    """What a run's `data.folder` holds: a cache, or one for each size. Raises ValueError if any is not finished or damaged."""

    def __init__(self, folder: Path):
        named = bucket_names(folder)
        self.parts = [EmbeddingCache(folder / k) for k in named] if named else [EmbeddingCache(folder)]
        self.prompts = [p for part in self.parts for p in part.prompts]
        self.resolution = self.parts[0].resolution  # all have one: the side of the square
        plans = [p.plan for p in self.parts]
        self.plan: Any = plans[0] if len(plans) == 1 else plans

    def expect(self, teacher: Mapping[str, Any]) -> None:
        for part in self.parts:
            part.expect(teacher)

    def with_images(self) -> None:
        for part in self.parts:
            part.with_images()

    def read_by(self, tokens: str) -> None:
        """Raises ValueError if what encoded it read prompts otherwise (models.load.reading); an early cache does not say."""
        for part in self.parts:
            if part.plan.get("tokens", tokens) != tokens:
                raise ValueError(
                    f"{part.folder} was encoded with another prompt template or length of text than this teacher's "
                    "pipeline has now: encode again"
                )

    @property
    def drawn_by_teacher(self) -> bool:
        """Whether what the critic takes for real the teacher has drawn."""
        return any(part.plan.get("reals") != "source" for part in self.parts)

    @property
    def null(self) -> Cond:
        return self.parts[0].null


def mix_buckets(deals: Sequence[BatchFn], prompts: Sequence[int], seed: int) -> BatchFn:
    """One of several deals a step, drawn in proportion to its prompts, each going through its own in turn. `prompts`: how many
    each has; the numbers of a batch's prompts count through all of them. Pure in the step."""
    drawn: list[int] = []
    weights = torch.tensor(prompts, dtype=torch.float64)

    def deal(step: int) -> tuple[Batch, list[int]]:
        while len(drawn) <= step:
            g = generator(seed, "bucket", len(drawn))
            drawn.append(int(torch.multinomial(weights, 1, generator=g)))
        k = drawn[step]
        batch, samples = deals[k](drawn[:step].count(k))
        assert batch.prompt is not None
        return Batch(batch.cond, batch.real, batch.prompt + sum(prompts[:k]), batch.other), samples

    return deal
