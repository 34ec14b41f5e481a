"""Buckets: image sizes of about one area, a cache for each and for each number of source images, one of them per step; and
caches as a recipe's data."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from advdmd.data.captioned_images import hash_of
from advdmd.data.embedding_cache import OLD_FORMAT, SKETCH, TEACHER_IMAGES_WARNING, EmbeddingCache, bucket_names
from advdmd.data.loader import BatchConfig, BatchFn, TrainingData, Validation, make_batch_fn
from advdmd.models.backbone import Backbone
from advdmd.models.fingerprints import encoder_fingerprint, file_fingerprint, tokenization_fingerprint
from advdmd.models.loading import pipeline_folder
from advdmd.rng import generator
from advdmd.types import Batch, Cond, Json

RATIOS = (1.0, 5 / 4, 4 / 3, 3 / 2, 16 / 9)  # of the longer side to the shorter
SAMPLE_PROMPTS = 6  # prompts of a cache in sample grids
Size = tuple[int, int]  # height, width in pixels


def bucket_sizes(resolution: int, unit: int) -> list[Size]:
    """A square of side `resolution` and rectangles of about its area, landscape and portrait; sides are multiples of `unit`."""
    found = []
    for ratio in RATIOS:
        long, short = (max(unit, round(resolution * f / unit) * unit) for f in (math.sqrt(ratio), math.sqrt(1 / ratio)))
        found += [(short, long), (long, short)]
    return sorted(set(found))


def nearest_bucket(choices: Sequence[Size], size: Size) -> Size:
    """The choice whose aspect ratio is nearest to that of an image."""
    return min(choices, key=lambda s: abs(_log_ratio(s) - _log_ratio(size)))


def _log_ratio(size: Size) -> float:
    return math.log(size[1] / size[0])


def bucket_name(size: Size, sources: int) -> str:
    """A bucket's folder: "832x1216", height first, or "832x1216-2-sources" of prompts with so many source images."""
    return f"{size[0]}x{size[1]}" + (f"-{sources}-sources" if sources > 1 else "")


@dataclass(frozen=True, kw_only=True)
class CachedData:
    """A user's own prompts and images: `folder` is what `advdmd encode` wrote."""

    folder: str = ""

    @property
    def has_validation(self) -> bool:
        """There is no score on a user's own data while training."""
        return False

    def beside(self, run: Path) -> "CachedData":
        """The same, for a run's folder that was moved together with its cache, whose path is relative."""
        moved = run.absolute().parent / self.folder
        there = (Path(self.folder).expanduser() / "plan.json").is_file() or not (moved / "plan.json").is_file()
        return self if there else CachedData(folder=str(moved))

    def open(self, teacher: str) -> "BucketedCache":
        """Raises ValueError if the cache is missing, not finished, damaged, without images or made by another teacher."""
        cache = BucketedCache(Path(self.folder).expanduser())
        cache.check_teacher(pipeline_folder(teacher))
        cache.check_has_images()
        return cache


class BucketedCache:
    """A finished cache, or a folder with one for each size and number of source images.

    Raises ValueError if any is not finished or damaged.
    """

    needs_encoders = False

    def __init__(self, folder: Path):
        named = bucket_names(folder)
        self.parts = [EmbeddingCache(folder / k) for k in named] if named else [EmbeddingCache(folder)]
        self.prompts = [p for part in self.parts for p in part.prompts]
        self.source_images = max(p.source_images for p in self.parts)
        self.resolution: int | None = self.parts[0].resolution  # the same for all: the side of the square
        first: Json = self.parts[0].plan
        self.plan: object = {k: first.get(k) for k in ("teacher", "tokens", "resolution", "reals")}
        hashes = sorted({h for part in self.parts for h in part.prompt_hashes()})
        self.contents: Json | None = {
            "content": hash_of(p.content for p in self.parts),
            "prompts": len(self.prompts),
            "sketch": hashes[:SKETCH],
        }

    def check_teacher(self, teacher: Path) -> None:
        """Raises ValueError if another teacher's encoders made a part."""
        old = self.parts[0].manifest["format"] == OLD_FORMAT
        fingerprint = file_fingerprint(teacher) if old else encoder_fingerprint(teacher)
        for part in self.parts:
            part.check_teacher(fingerprint)

    def check_has_images(self) -> None:
        """Raises ValueError if a prompt has no image."""
        for part in self.parts:
            part.check_has_images()

    def check_tokenization(self, tokens: str) -> None:
        """Raises ValueError if the teacher tokenizes prompts otherwise now (models.fingerprints.tokenization_fingerprint).

        A cache of an early version does not say how they were tokenized.
        """
        for part in self.parts:
            if part.plan.get("tokens", tokens) != tokens:
                raise ValueError(
                    f"{part.folder} was encoded with another prompt template or length of text than this teacher's "
                    "pipeline has now: encode again"
                )

    @property
    def warning(self) -> str:
        """What images that the teacher has generated cost, if there are such."""
        teacher = any(part.plan.get("reals") != "source" for part in self.parts)
        return TEACHER_IMAGES_WARNING if teacher else ""

    @property
    def null(self) -> Cond:
        """The empty prompt [1]."""
        return self.parts[0].null

    def load(self, backbone: Backbone, config: BatchConfig) -> TrainingData:
        """Batches of one size and number of source images each.

        Conditions have the transformer's type, in which it takes them anyway.

        Raises ValueError if the teacher tokenizes prompts otherwise than when they were encoded.
        """
        self.check_tokenization(tokenization_fingerprint(backbone))
        squarest = min(self.parts, key=lambda p: abs(_log_ratio(p.plan.get("size", (1, 1)))))  # as sample grids are

        def cond_of(part: EmbeddingCache) -> Callable[[Sequence[int]], Cond]:
            return lambda i: part.cond(i).to(backbone.dtype)

        batch_fns = [make_batch_fn(len(p.prompts), config, cond_of(p), p.real) for p in self.parts]
        sizes = [len(p.prompts) for p in self.parts]
        batch_fn = mix_buckets(batch_fns, sizes, config.seed) if len(batch_fns) > 1 else batch_fns[0]
        shown = range(min(SAMPLE_PROMPTS, len(squarest.prompts)))
        return TrainingData(batch_fn, self.prompts, self.null.to(backbone.dtype), cond_of(squarest)(shown))

    def validation(self, images: int) -> Validation | None:
        """None."""
        return None


def mix_buckets(batch_fns: Sequence[BatchFn], prompts: Sequence[int], seed: int) -> BatchFn:
    """One of several batch functions per step, drawn in proportion to its number of prompts.

    Each goes through its own in order.

    The prompt indices of a batch count through all prompts. Pure in the step.
    """
    drawn: list[int] = []
    weights = torch.tensor(prompts, dtype=torch.float64)

    def batch_fn(step: int) -> tuple[Batch, list[int]]:
        while len(drawn) <= step:
            g = generator(seed, "bucket", len(drawn))
            drawn.append(int(torch.multinomial(weights, 1, generator=g)))
        k = drawn[step]
        batch, samples = batch_fns[k](drawn[:step].count(k))
        assert batch.prompt_index is not None
        index = batch.prompt_index + sum(prompts[:k])
        return Batch(batch.cond, batch.real_latents, index, batch.mismatched_cond), samples

    return batch_fn
