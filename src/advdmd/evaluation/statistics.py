"""Means with prompt-clustered bootstrap intervals, and paired differences."""

from collections.abc import Sequence

import numpy as np

from advdmd.types import Json

RESAMPLES = 2000

Rows = list[Json]  # one per image: item, k, task, loose (the suite's official rule), strict, reason, ...


def _by_prompt(table: Rows, key: str) -> dict[str, list[np.ndarray]]:
    """Task -> scores of each prompt's images."""
    out: dict[str, dict[str, list[float]]] = {}
    for r in table:
        out.setdefault(r["task"], {}).setdefault(r["item"], []).append(r[key])
    return {t: [np.array(v) for v in prompts.values()] for t, prompts in out.items()}


def _resampled(prompts: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """[RESAMPLES] means over images when prompts are drawn with replacement."""
    total, count = np.array([p.sum() for p in prompts]), np.array([len(p) for p in prompts])
    i = rng.integers(len(prompts), size=(RESAMPLES, len(prompts)))
    return total[i].sum(1) / count[i].sum(1)


def interval(means: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled means [RESAMPLES]."""
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def summarize(table: Rows, key: str) -> Json:
    """Mean and interval of each task, and of `overall`: the unweighted mean of the tasks, as in GenEval."""
    rng, tasks = np.random.default_rng(0), _by_prompt(table, key)
    means = {t: float(np.concatenate(p).mean()) for t, p in tasks.items()}
    draws = {t: _resampled(p, rng) for t, p in tasks.items()}
    out = {t: {"mean": means[t], "interval": interval(draws[t])} for t in tasks}
    overall = np.stack(list(draws.values())).mean(0)
    return {"overall": {"mean": float(np.mean(list(means.values()))), "interval": interval(overall)}, **out}


def _check_same_images(tables: Sequence[Rows]) -> None:
    """Raise ValueError unless all tables are about the same prompts, image indices and evaluation seed."""
    names = [[(r["item"], r["k"], r.get("suite_hash"), r.get("seed")) for r in t] for t in tables]
    if any(n != names[0] for n in names):
        raise ValueError("these results are of different suites, sizes or seeds: a paired difference needs the same images")


def paired_difference(ours: Sequence[Rows], theirs: Sequence[Rows], key: str = "strict") -> Json:
    """Mean difference ours - theirs, overall and per task, images paired by prompt and index; also relative to theirs.

    One table per training seed; `theirs` may be a single one, for a model that was not trained here. The interval resamples
    prompts and training seeds together. Raises ValueError if the tables were not scored on the same images' keys.
    """
    if len(theirs) not in (1, len(ours)):
        raise ValueError(f"{len(ours)} results against {len(theirs)}: as many on both sides, or one to compare all with")
    _check_same_images([*ours, *theirs])
    rng, S = np.random.default_rng(0), len(ours)
    per_seed = [
        _by_prompt([x | {key: x[key] - y[key]} for x, y in zip(a, b, strict=True)], key)
        for a, b in zip(ours, [theirs[0]] * S if len(theirs) == 1 else theirs, strict=True)
    ]
    seeds, means, draws = rng.integers(S, size=(RESAMPLES, S)), {}, {}
    for task, prompts in per_seed[0].items():
        total = np.array([[p.sum() for p in d[task]] for d in per_seed])  # [S, P]
        count = np.array([len(p) for p in prompts])
        i = rng.integers(len(count), size=(RESAMPLES, len(count)))
        means[task] = float(total.sum() / count.sum() / S)
        draws[task] = total[seeds[:, :, None], i[:, None, :]].sum((1, 2)) / count[i].sum(1) / S
    base = {t: float(np.mean([np.concatenate(_by_prompt(b, key)[t]).mean() for b in theirs])) for t in means}
    base["overall"], means["overall"] = (float(np.mean(list(x.values()))) for x in (base, means))
    draws["overall"] = np.stack(list(draws.values())).mean(0)
    return {t: {"mean": means[t], "interval": interval(draws[t]), "against": base[t]} for t in ("overall", *per_seed[0])}
