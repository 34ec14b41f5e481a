"""What a reward knows of a score: within-prompt correlation and best of N, with intervals over prompts."""

import numpy as np

from advdmd.evaluation.statistics import RESAMPLES, interval
from advdmd.types import Json


def _within(x: np.ndarray) -> np.ndarray:
    return x - x.mean(1, keepdims=True)


def within_prompt_correlation(reward: np.ndarray, score: np.ndarray) -> Json:
    """Pearson correlation of rewards and scores [P, N] of P prompts' N images, each without its prompt's mean.

    What a group-relative policy gradient can use of a reward. Prompts whose images score alike add to neither side. None if no
    two images of a prompt score differently.
    """
    r, s = _within(reward.astype(float)), _within(score.astype(float))
    rows = np.stack([(r * s).sum(1), (r * r).sum(1), (s * s).sum(1)])  # [3, P]
    if not (rows[1].sum() > 0 and rows[2].sum() > 0):
        return {"mean": None, "interval": None}

    def correlation(found: np.ndarray) -> np.ndarray:
        return found[0] / np.sqrt(np.maximum(found[1] * found[2], 1e-30))

    i = np.random.default_rng(0).integers(len(r), size=(RESAMPLES, len(r)))
    return {"mean": float(correlation(rows.sum(1))), "interval": interval(correlation(rows[:, i].sum(2)))}


def best_of_n(reward: np.ndarray, score: np.ndarray) -> Json:
    """Mean score [P, N] of each prompt's image with the highest reward [P, N], with interval."""
    best = score[np.arange(len(score)), reward.argmax(1)].astype(float)
    i = np.random.default_rng(0).integers(len(best), size=(RESAMPLES, len(best)))
    return {"mean": float(best.mean()), "interval": interval(best[i].mean(1))}


def with_interval(found: Json) -> str:
    """A mean and its interval as text."""
    if found["mean"] is None:
        return "not measured: images of a prompt score alike"
    return f"{found['mean']:+.3f} [{found['interval'][0]:+.3f}, {found['interval'][1]:+.3f}]"


def paired_change(after: np.ndarray, before: np.ndarray) -> Json:
    """Mean of after - before, [P, N] each, of the same prompts and noise, with an interval over prompts."""
    change = (after.astype(float) - before.astype(float)).mean(1)
    i = np.random.default_rng(0).integers(len(change), size=(RESAMPLES, len(change)))
    return {"mean": float(change.mean()), "interval": interval(change[i].mean(1))}
