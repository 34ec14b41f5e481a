"""Validation while training: scores of the EMA student, the best one kept, early stopping."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from advdmd.data.loader import Validation
from advdmd.files import file_hash, read_object, read_tensors, write_atomically, write_text
from advdmd.models.images import ImageSampler
from advdmd.recipes.recipe import Recipe
from advdmd.types import Json, Metrics

HINT = "delete best.json: the EMA of the last iteration is then exported"


def validate(
    r: Recipe, validation: Validation, generate: ImageSampler, net: nn.Module, folder: Path, iteration: int
) -> Metrics:
    """Scores of a student after `iteration` iterations, as metrics.

    Keeps it in `folder` as best-STEP.safetensors if none was better.

    generate: samples images with `net`, the EMA student.
    """
    scores = validation(generate)
    found = read_best(folder)
    if scores["strict"] > found["strict"]:
        weights = {k: v.contiguous() for k, v in net.state_dict().items()}
        kept = folder / f"best-{iteration:07d}.safetensors"
        write_atomically(kept, lambda p: save_file(weights, p))
        found = {"step": iteration, "strict": scores["strict"], "file": kept.name, "sha256": file_hash(kept)}
    write_text(folder / "best.json", json.dumps(found | {"last": iteration}))
    for older in folder.glob("best*.safetensors"):
        if older.name != found.get("file", "best.safetensors"):
            older.unlink()
    forwards = {"eval/forwards_per_sample": r.forwards_until(iteration)}
    return forwards | {f"eval/{name}": score for name, score in scores.items()}


def should_stop_early(r: Recipe, folder: Path) -> bool:
    """Whether `patience` validations in a row were no better than the best one."""
    found = read_best(folder)
    return r.patience > 0 and found["last"] - found["step"] >= r.patience * r.eval_every


def read_best(folder: Path) -> Json:
    """Iteration ("step") and score ("strict") of the best EMA kept so far, and the iteration of the last validation ("last").

    Without validations the score is below all. Raises ValueError if the record is damaged.
    """
    record = folder / "best.json"
    none: Json = {"step": 0, "strict": -1.0, "last": 0}
    return read_object(record, *none, hint=HINT) if record.is_file() else none


def load_best(folder: Path, net: nn.Module) -> int:
    """Load the best EMA into a network, in place; returns its iteration (0: there was no validation, the network is as it was).

    Raises ValueError if the file is damaged.
    """
    found = read_best(folder)
    if found["step"]:
        file = folder / found.get("file", "best.safetensors")  # its name before it had its iteration in it
        net.load_state_dict(read_tensors(file, hint=HINT, sha256=found.get("sha256")))
    return int(found["step"])
