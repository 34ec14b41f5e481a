"""Verdicts to tables: means per task, prompt-clustered bootstrap intervals, paired differences."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from advdmd.evaluation.benchmark import Benchmark, Verdict
from advdmd.evaluation.generate import jobs
from advdmd.files import file_hash, object_hash, read_lines, read_object, write_text

RESAMPLES = 2000
SCORE_AGAIN = "score again"
OWN_REWARD = " (its own training reward)"
Rows = list[dict[str, Any]]  # one per image: item, k, task, loose, strict, reason, ...


def rows(benchmark: Benchmark, verdicts: Sequence[Verdict]) -> Rows:
    pairs = zip(jobs(benchmark), verdicts, strict=True)
    return [{"item": i.id, "k": k, "task": i.task, "prompt": i.prompt, **asdict(v)} for (i, k), v in pairs]


def verdict_of(row: dict[str, Any]) -> Verdict:
    return Verdict(*(row[k] for k in ("loose", "strict", "reason", "details")))


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
    """The middle 95 % of resampled means."""
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def summarise(table: Rows, key: str) -> dict[str, Any]:
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


def paired(ours: Sequence[Rows], theirs: Sequence[Rows], key: str = "strict") -> dict[str, Any]:
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


def write_results(folder: Path, table: Rows, summary: dict[str, Any]) -> None:
    """Beside the images: verdicts.jsonl, table.json, table.md; and scores.json, small enough to keep, for `compare`."""
    scores: dict[str, dict[str, list[list[float]]]] = {}
    for r in table:
        scores.setdefault(r["task"], {}).setdefault(r["item"], []).append([round(r["loose"], 4), round(r["strict"], 4)])
    verdicts = "".join(json.dumps(r) + "\n" for r in table)
    write_text(folder / "verdicts.jsonl", verdicts)
    hashed = {"verdicts_sha256": hashlib.sha256(verdicts.encode()).hexdigest()}
    write_text(folder / "table.json", json.dumps(summary | hashed, indent=1))
    write_text(folder / "table.md", markdown({folder.name: summary}))
    kept = summary | {"scores": scores}
    write_text(folder / "scores.json", json.dumps(kept | {"sha256": object_hash(kept)}))


def read_verdicts(folder: Path) -> Rows:
    """Raises ValueError if there are none, or not those of the table beside them."""
    file, table = folder / "verdicts.jsonl", folder / "table.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no verdicts.jsonl: score it first")
    told = read_object(table, way_out=SCORE_AGAIN) if table.is_file() else {}
    if (wanted := told.get("verdicts_sha256")) and file_hash(file) != wanted:
        raise ValueError(f"{file} is damaged (its hash differs from table.json): {SCORE_AGAIN}")
    return read_lines(file, "item", "k", way_out=SCORE_AGAIN)


def read_scores(path: Path) -> tuple[dict[str, Any], Rows]:
    """Summary and rows from scores.json, or from the folder that holds it."""
    file = path / "scores.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} holds no scores.json: score it first with advdmd eval")
    summary = read_object(file, "scores", way_out=f"name an evaluation's folder or its scores.json, or {SCORE_AGAIN}")
    if (wanted := summary.pop("sha256", None)) and object_hash(summary) != wanted:
        raise ValueError(f"{file} is damaged (what it says has another hash): {SCORE_AGAIN}")
    try:
        same = {k: summary[k] for k in ("suite", "suite_hash", "seed")}
        rows = [
            {"task": task, "item": item, "k": k, "loose": float(loose), "strict": float(strict), **same}
            for task, items in summary.pop("scores").items()
            for item, images in items.items()
            for k, (loose, strict) in enumerate(images)
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"{file} is damaged ({e!r}): score again") from None
    return summary, rows


def compare(ours: Sequence[Path], theirs: Sequence[Path]) -> dict[str, Any]:
    """Two sides, each one or more evaluations (training seeds): their means, and the paired difference."""
    a, b = ([read_scores(f) for f in side] for side in (ours, theirs))

    def side(found: Sequence[tuple[dict[str, Any], Rows]]) -> dict[str, Any]:
        summaries = [summary for summary, _ in found]
        spread = [s["diversity"]["mean"] for s in summaries if s["diversity"]]
        return {
            "models": [s["model"] for s in summaries],
            "strict": [s["strict"]["overall"]["mean"] for s in summaries],
            "loose": [s["loose"]["overall"]["mean"] for s in summaries],
            "diversity": float(np.mean(spread)) if spread else None,
            "nfe": summaries[0]["nfe"],
        }

    judges = {summary.get("judge_hash", "checker-1") for summary, _ in [*a, *b]}
    if len(judges) > 1:
        raise ValueError("these results are of different judges: a paired difference needs the same one")
    about = {k: a[0][0][k] for k in ("suite", "split", "images")}
    difference = {k: paired([rows for _, rows in a], [rows for _, rows in b], k) for k in ("strict", "loose")}
    return {**about, "ours": side(a), "theirs": side(b), "difference": difference}


def _cell(x: dict[str, Any]) -> str:
    return f"{x['mean']:.3f} [{x['interval'][0]:.3f}, {x['interval'][1]:.3f}]"


def _headline(summary: dict[str, Any]) -> tuple[str, str]:
    """(rule of the headline, the other one): the miniature's is strict, a published benchmark's its own."""
    return ("strict", "loose") if str(summary.get("suite", "mini-")).startswith("mini-") else ("loose", "strict")


def markdown(summaries: dict[str, dict[str, Any]]) -> str:
    """`cells` as a table of Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in cells(summaries)]
    return "\n".join([lines[0], "|---" * (len(summaries) + 1) + "|", *lines[1:]]) + "\n"


def cells(summaries: dict[str, dict[str, Any]]) -> list[list[str]]:
    """One column per model: the headline rule by task, the other rule, kinds, diversity, what it cost; names first.

    Raises ValueError if the columns were judged by different judges: their figures are not one row.
    """
    names, first = list(summaries), next(iter(summaries.values()))
    judges = {s.get("judge", "checker").removesuffix(OWN_REWARD) for s in summaries.values()}
    if len(judges) > 1:
        raise ValueError(f"figures of different judges ({', '.join(sorted(judges))}) are not one table")
    judge, (rule, other) = next(iter(judges)), _headline(first)
    title = first.get("suite", "") + (f"[{judge}]" if judge != "checker" else "")
    row = lambda label, cell: [label, *(cell(summaries[n]) for n in names)]  # noqa: E731
    lines = [[f"{title} {'strict' if rule == 'strict' else 'official'}".strip(), *names]]
    if any(s.get("judge", "").endswith(OWN_REWARD) for s in summaries.values()):
        lines.append(row("**trained on this judge**", lambda s: "yes" if s["judge"].endswith(OWN_REWARD) else "no"))
    if any(s.get("images") != s.get("of", s.get("images")) for s in summaries.values()):
        lines.append(row("**how much of it**", lambda s: f"partial {s['images']}/{s['of']}"))
    if any(s.get("dropped") for s in summaries.values()):
        lines.append(row("**images left out by the official arithmetic**", lambda s: str(s.get("dropped", 0))))
    for task in first[rule]:
        label = f"**{task}**" if task == "overall" else task
        lines.append(row(label, lambda s, task=task: _cell(s[rule][task])))
    lines.append(row(f"{other}, overall", lambda s: _cell(s[other]["overall"])))
    for kind in first.get("breakdown") or {}:
        lines.append(row(kind, lambda s, kind=kind: f"{s['breakdown'].get(kind, float('nan')):.3f}"))
    if any(s.get("diversity") for s in summaries.values()):
        lines.append(
            row("diversity against the renderer", lambda s: f"{s['diversity']['mean']:.2f}" if s.get("diversity") else "-")
        )
    lines.append(row("evaluations per image", lambda s: str(s.get("nfe") or "-")))
    return lines
