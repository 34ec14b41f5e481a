"""What a benchmark offers: items to draw, and verdicts on what was drawn. Generating and scoring meet only on disk."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Item:
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


class Benchmark(Protocol):
    """A suite: a new one is one file with these."""

    @property
    def name(self) -> str: ...
    def items(self) -> Sequence[Item]: ...
    def judge(self, items: Sequence[Item], images: np.ndarray) -> list[Verdict]: ...


def suite_hash(items: Sequence[Item]) -> str:
    """What tells two suites apart: their prompts, in order, and how many images of each."""
    said = [[i.id, i.task, i.prompt, i.n_images] for i in items]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
