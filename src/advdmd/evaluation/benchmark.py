"""What a benchmark offers: prompts to sample, and verdicts on the images. Generating and scoring meet only on disk."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from advdmd.types import Json

Judgement = Json  # what a judge found in one image, as JSON holds it
PUBLISHED = ("geneval", "dpg")  # suites whose headline is their own rule; the miniature's is the strict one


@dataclass(frozen=True)
class SuiteItem:
    """One prompt of a suite: its task, what a verdict needs to know, and how many images of it are sampled."""

    id: str
    prompt: str
    task: str
    meta: Json
    n_images: int


@dataclass(frozen=True)
class Verdict:
    """The score of one image in [0, 1], by the suite's own rule (`official`) and by the strict one; why it failed."""

    official: float
    strict: float
    reason: str
    details: Json = field(default_factory=dict)

    def to_json(self) -> Json:
        """As it is kept in verdicts.jsonl: a file format, whose keys do not change."""
        return {"loose": self.official, "strict": self.strict, "reason": self.reason, "details": self.details}

    @classmethod
    def from_json(cls, row: Json) -> "Verdict":
        """Inverse of `to_json`."""
        return cls(row["loose"], row["strict"], row["reason"], row["details"])


class ExcludedItem(Exception):
    """Raised by `Benchmark.verdict` where a published script's own arithmetic leaves a prompt out of its mean."""


class Judge(Protocol):
    """What judges the images of a suite: the miniature's checker, a detector, a model that answers questions.

    `name` goes beside every figure; `fingerprint` tells judges apart whose answers must not be mixed; `batch`: images per call.
    """

    name: str
    fingerprint: str
    batch: int

    def self_test(self) -> None:
        """Raises ValueError if its answers cannot be trusted."""
        ...

    def judge(self, items: Sequence[SuiteItem], images: Sequence[np.ndarray]) -> list[Judgement]:
        """A judgement of each of N images [H, W, 3] uint8 of N items. Raises ValueError or RuntimeError if it fails."""
        ...


class Benchmark(Protocol):
    """A suite: a new one is one file with these methods."""

    @property
    def name(self) -> str:
        """Of the suite."""
        ...

    @property
    def split(self) -> str:
        """Of the suite's prompts."""
        ...

    def items(self) -> Sequence[SuiteItem]:
        """The prompts, in order."""
        ...

    def verdict(self, item: SuiteItem, judgement: Judgement) -> Verdict:
        """The score of a judged image: pure arithmetic, no model and no file. Raises ExcludedItem."""
        ...

    def breakdown(self, items: Sequence[SuiteItem], verdicts: Sequence[Verdict]) -> Mapping[str, float]:
        """Scores by kind of question, if the suite has kinds."""
        ...

    def diversity(self, folder: Path) -> Mapping[str, float]:
        """Spread of what prompts leave open over a folder of images, where the suite can measure it; else empty."""
        ...


def suite_hash(items: Sequence[SuiteItem]) -> str:
    """What tells two suites apart: their prompts, in order, and how many images of each."""
    described = [[i.id, i.task, i.prompt, i.n_images] for i in items]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
