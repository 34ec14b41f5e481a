"""GenEval's verdict on detected objects: pure arithmetic, shared by the miniature and by real detectors.

Ghosh et al. 2023 (2310.11513) and its published scorer: every `include` clause must hold and no `exclude` clause may.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from advdmd.types import Json

POSITION_MARGIN = 0.1  # share of both boxes' extents that an offset must exceed to count


@dataclass(frozen=True)
class Detection:
    """One detected object: class name, colour name or None, box (left, top, right, bottom), confidence in [0, 1]."""

    label: str
    color: str | None
    box: tuple[float, float, float, float]
    confidence: float


def relative_position(a: Detection, b: Detection) -> set[str]:
    """Where a stands relative to b: a subset of left of, right of, above, below (y grows downwards)."""
    box_a, box_b = np.array(a.box).reshape(2, 2), np.array(b.box).reshape(2, 2)
    offset = box_a.mean(0) - box_b.mean(0)
    extent = np.abs(np.diff(box_a, axis=0))[0] + np.abs(np.diff(box_b, axis=0))[0]
    revised = np.maximum(np.abs(offset) - POSITION_MARGIN * extent, 0) * np.sign(offset)
    if (np.abs(revised) < 1e-3).all():
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    names = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {k for k, holds in names.items() if holds}


def _first_failure(clause: Json, found: Sequence[Detection], earlier: list[list[Detection]]) -> str | None:
    """The reason an include clause fails, or None. `found` are the clause's objects, the most confident `count`."""
    label, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {label}>={count}, found {len(found)}"
    if "color" in clause:
        matching = sum(d.color == clause["color"] for d in found)
        if matching < count:
            seen = ", ".join(str(d.color) for d in found)
            return f"expected {clause['color']} {label}>={count}, found {matching} ({seen})"
    if "position" in clause:
        relation, other = clause["position"]
        if not earlier[other]:
            return f"no target for {label} to be {relation}"
        for target in earlier[other]:
            for d in found:
                if relation not in relative_position(d, target):
                    return f"expected {label} {relation} target, found {sorted(relative_position(d, target)) or 'neither'}"
    return None


def geneval_correct(meta: Json, detections: Sequence[Detection]) -> tuple[bool, str]:
    """Whether GenEval calls the image correct, and every reason it does not, joined by newlines.

    meta: {"include": [{"class", "count", "color"?, "position"?: (relation, index)}], "exclude"?: [{"class", "count"}]}.
    """
    reasons, matched = [], []
    by_label = lambda c: sorted((d for d in detections if d.label == c), key=lambda d: -d.confidence)  # noqa: E731
    for clause in meta.get("include", []):
        found = by_label(clause["class"])[: clause["count"]]
        reason = _first_failure(clause, found, matched)
        matched.append(found if reason is None else [])
        if reason:
            reasons.append(reason)
    for clause in meta.get("exclude", []):
        if len(by_label(clause["class"])) >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {len(by_label(clause['class']))}")
    return not reasons, "\n".join(reasons)
