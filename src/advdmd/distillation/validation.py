"""Validation while training: scores of the EMA student, the best one kept, early stopping."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from advdmd.files import file_hash, read_object, read_tensors, write_atomically, write_text
from advdmd.recipes.recipe import Recipe
from advdmd.types import Json, Metrics

HINT = "delete best.json: the EMA of the last iteration is then exported"
START_FILE = "start.json"  # scores of the few-step model that a run's student starts from


def record(r: Recipe, scores: Metrics, net: nn.Module, folder: Path, iteration: int) -> Metrics:
    """Scores of the EMA student `net` after `iteration` iterations, as metrics.

    Keeps the student in `folder` as best-STEP.safetensors if none was better.
    """
    found = read_best(folder)
    if scores["score"] > found["score"]:
        weights = {k: v.contiguous() for k, v in net.state_dict().items()}
        kept = folder / f"best-{iteration:07d}.safetensors"
        write_atomically(kept, lambda p: save_file(weights, p))
        found = {"step": iteration, "score": scores["score"], "file": kept.name, "sha256": file_hash(kept)}
    write_text(folder / "best.json", json.dumps(found | {"last": iteration}))
    for older in folder.glob("best*.safetensors"):
        if older.name != found.get("file", "best.safetensors"):
            older.unlink()
    forwards = {"eval/forwards_per_sample": r.forwards_until(iteration)}
    return forwards | {f"eval/{name}": score for name, score in scores.items()}


def record_start(scores: Metrics, folder: Path) -> None:
    """Keep the scores of the model that a run's student starts from, before any update."""
    write_text(folder / START_FILE, json.dumps(scores))


def start_table(folder: Path, metrics: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """Scores of a run's start beside those of its best student so far, names first; empty without either."""
    best = read_best(folder)["step"]
    found = next((m for m in metrics if m["step"] == best - 1 and "eval/score" in m), None)
    if found is None or not (folder / START_FILE).is_file():
        return []
    start = read_object(folder / START_FILE, "score", hint=f"delete {START_FILE}")
    rows = [[k, f"{v:.3f}", f"{found[f'eval/{k}']:.3f}", f"{found[f'eval/{k}'] - v:+.3f}"] for k, v in start.items()]
    return [["validation", "the start", f"student after {best} iterations", "difference"], *rows]


def should_stop_early(r: Recipe, folder: Path) -> bool:
    """Whether `patience` validations in a row were no better than the best one."""
    found = read_best(folder)
    return r.patience > 0 and found["last"] - found["step"] >= r.patience * r.eval_every


def read_best(folder: Path) -> Json:
    """Iteration ("step") and "score" of the best EMA kept so far, and the iteration of the last validation ("last").

    Without validations the score is below all. Raises ValueError if the record is damaged.
    """
    record = folder / "best.json"
    none: Json = {"step": 0, "score": -math.inf, "last": 0}
    found = read_object(record, "step", "last", hint=HINT) if record.is_file() else none
    found = found if "score" in found else {"score": found.get("strict"), **found}  # its name in earlier versions
    if not isinstance(found["score"], float | int):
        raise ValueError(f"{record} is damaged (no score): {HINT}")
    return found


def load_best(folder: Path, net: nn.Module) -> int:
    """Load the best EMA into a network, in place; returns its iteration (0: there was no validation, the network is as it was).

    Raises ValueError if the file is damaged.
    """
    found = read_best(folder)
    if found["step"]:
        file = folder / found.get("file", "best.safetensors")  # its name before it had its iteration in it
        net.load_state_dict(read_tensors(file, hint=HINT, sha256=found.get("sha256")))
    return int(found["step"])
