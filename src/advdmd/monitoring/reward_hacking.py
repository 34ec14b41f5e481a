"""Reward hacking: the discriminator's reward rises while the validation score falls."""

import math
from collections.abc import Mapping, Sequence

TOLERANCE = 0.02  # of a score, about the standard error of a validation


def reward_hacking_step(metrics: Sequence[Mapping[str, float]]) -> int | None:
    """The iteration after which the reward rose while the score fell, or None.

    Two validations in a row score more than TOLERANCE below the best so far, while the mean reward is higher than around that
    best one. There is no reward before the first policy update: a best validation before it counts with the first reward.
    """
    rewards: list[float] = []
    points: list[tuple[int, float, float]] = []  # iteration, score, mean reward since the validation before
    for m in metrics:
        if "reward/final" in m:
            rewards.append(m["reward/final"])
        if "eval/score" in m:
            mean = sum(rewards) / len(rewards) if rewards else float("nan")
            points.append((int(m["step"]) + 1, m["eval/score"], mean))
            rewards = []
    for i in range(2, len(points)):
        _, best, reward_then = max(points[:i], key=lambda p: p[1])
        if math.isnan(reward_then):
            reward_then = next((reward for _, _, reward in points if not math.isnan(reward)), reward_then)
        if all(score < best - TOLERANCE and reward > reward_then for _, score, reward in points[i - 1 : i + 1]):
            return points[i - 1][0]
    return None
