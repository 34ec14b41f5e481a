"""What a benchmark offers: items to draw, and verdicts on what was drawn. Generating and scoring meet only on disk."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Judgement = dict[str, Any]  # what was seen in one image, as JSON holds it


@dataclass(frozen=True)
class SuiteItem:
    """One prompt of a suite: its task, what a scorer needs to know, and how many images of it are drawn."""

    id: str
    prompt: str
    task: str
    meta: dict[str, Any]
    n_images: int


@dataclass(frozen=True)
class Verdict:
    """The score of one image in [0, 1], by the suite's own rule (`loose`) and by the strict one; why it failed."""

    loose: float
    strict: float
    reason: str
    details: dict[str, Any] = field(default_factory=dict)


class ExcludedItem(Exception):
    """Raised by `verdict` where a published script's own arithmetic leaves a prompt out of its mean."""


class Benchmark(Protocol):
    """A suite: a new one is one file with these."""

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str: ...
    def items(self) -> Sequence[SuiteItem]: ...
    def verdict(self, item: SuiteItem, perception: Judgement) -> Verdict: ...  # pure: no model, no file
    def breakdown(
        self, items: Sequence[SuiteItem], verdicts: Sequence[Verdict]
    ) -> dict[str, float]: ...  # by kind, if it has kinds


class Judge(Protocol):
    """What looks at the images of a suite: the miniature's checker, a detector, a judge that answers questions.

    `name` goes beside every figure; `fingerprint` tells judges apart whose answers must not be mixed.
    """

    name: str
    fingerprint: str
    batch: int  # images it is shown at a time

    def self_test(self) -> None: ...  # raises ValueError if its answers cannot be trusted
    def look(self, items: Sequence[SuiteItem], images: Sequence[np.ndarray]) -> list[Judgement]: ...  # images [H, W, 3] uint8


def suite_hash(items: Sequence[SuiteItem]) -> str:
    """What tells two suites apart: their prompts, in order, and how many images of each."""
    said = [[i.id, i.task, i.prompt, i.n_images] for i in items]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
