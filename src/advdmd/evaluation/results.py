"""Results on disk: verdicts and scores beside the images, and comparisons of them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from advdmd.evaluation.benchmark import Benchmark, Verdict
from advdmd.evaluation.generate import image_jobs
from advdmd.evaluation.statistics import Rows, paired_difference
from advdmd.evaluation.tables import markdown
from advdmd.files import file_hash, object_hash, read_lines, read_object, write_text
from advdmd.types import Json

SCORE_AGAIN = "score again"


def verdict_rows(benchmark: Benchmark, verdicts: Sequence[Verdict]) -> Rows:
    """A row per image of a suite, from one verdict for each, in the order of `image_jobs`."""
    pairs = zip(image_jobs(benchmark), verdicts, strict=True)
    return [{"item": i.id, "k": k, "task": i.task, "prompt": i.prompt, **v.to_json()} for (i, k), v in pairs]


def write_results(folder: Path, table: Rows, summary: Json) -> None:
    """Write verdicts.jsonl, table.json and table.md beside the images, and scores.json, small enough to keep, for `compare`."""
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
    """The rows of a folder's verdicts.

    Raises ValueError if there are none, or if they are not those of the table beside them.
    """
    file, table = folder / "verdicts.jsonl", folder / "table.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no verdicts.jsonl: score it first")
    kwargs = read_object(table, hint=SCORE_AGAIN) if table.is_file() else {}
    if (wanted := kwargs.get("verdicts_sha256")) and file_hash(file) != wanted:
        raise ValueError(f"{file} is damaged (its hash differs from table.json): {SCORE_AGAIN}")
    return read_lines(file, "item", "k", hint=SCORE_AGAIN)


def read_scores(path: Path) -> tuple[Json, Rows]:
    """Summary and rows from scores.json, or from the folder that holds it. Raises ValueError if it is missing or damaged."""
    file = path / "scores.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} holds no scores.json: score it first with advdmd eval")
    summary = read_object(file, "scores", hint=f"name an evaluation's folder or its scores.json, or {SCORE_AGAIN}")
    if (wanted := summary.pop("sha256", None)) and object_hash(summary) != wanted:
        raise ValueError(f"{file} is damaged (what it says has another hash): {SCORE_AGAIN}")
    try:
        same = {k: summary[k] for k in ("suite", "suite_hash", "seed")}
        rows = [
            {"task": task, "item": item, "k": k, "loose": float(official), "strict": float(strict), **same}
            for task, items in summary.pop("scores").items()
            for item, images in items.items()
            for k, (official, strict) in enumerate(images)
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"{file} is damaged ({e!r}): score again") from None
    return summary, rows


def compare(ours: Sequence[Path], theirs: Sequence[Path]) -> Json:
    """Two sides, each one or more evaluations (training seeds): their means, and the paired difference.

    Raises ValueError if the results are of different judges, suites, sizes or seeds.
    """
    a, b = ([read_scores(f) for f in side] for side in (ours, theirs))

    def side(found: Sequence[tuple[Json, Rows]]) -> Json:
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
    difference = {k: paired_difference([rows for _, rows in a], [rows for _, rows in b], k) for k in ("strict", "loose")}
    return {**about, "ours": side(a), "theirs": side(b), "difference": difference}
