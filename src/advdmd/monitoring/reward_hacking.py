"""Reward hacking: the discriminator's reward rises while the validation score falls."""

import math
from collections.abc import Mapping, Sequence

TOLERANCE = 0.02  # of a score, about the standard error of an exam


def reward_hacking_step(metrics: Sequence[Mapping[str, float]]) -> int | None:
    """The step at which reward and score parted, if they did: two exams in a row more than MARGIN below the best so far, while
    the critic paid more than it did around that best one. Reward hacking looks like this.

    The critic pays only from the first policy turn on: a best exam from before counts as paid like the first one after."""
    paid: list[float] = []
    exams: list[tuple[int, float, float]] = []  # step, score, mean reward since the exam before
    for m in metrics:
        if "reward/end" in m:
            paid.append(m["reward/end"])
        if "exam/strict" in m:
            exams.append((int(m["step"]) + 1, m["exam/strict"], sum(paid) / len(paid) if paid else float("nan")))
            paid = []
    for i in range(2, len(exams)):
        _, top, then = max(exams[:i], key=lambda e: e[1])
        if math.isnan(then):
            then = next((reward for _, _, reward in exams if not math.isnan(reward)), then)
        if all(score < top - TOLERANCE and reward > then for _, score, reward in exams[i - 1 : i + 1]):
            return exams[i - 1][0]
    return None
