"""The folder of a training run: what belongs to it, which run it is of, and the recipe that it was started with."""

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

from advdmd.files import write_text
from advdmd.recipes import registry
from advdmd.recipes.overrides import diff, dump, flatten
from advdmd.recipes.recipe import Recipe
from advdmd.training import checkpoint

# What a run writes, and --overwrite may remove.
RUN_FILES = (
    ".*",
    "recipe.yaml",
    "metrics.jsonl",
    "checkpoints",
    "samples",
    "student",
    "best.json",
    "audit.json",
    "best*.safetensors",
    "validation.safetensors",
    "tensorboard",
    "wandb",
)


# What a run may go on with: where things are, how long the run is, how often it saves and looks.
CHANGEABLE = (
    "iterations", "data.folder", "threads", "device", "compile", "save_every", "sample_every", "eval_every", "patience",
    "algorithm.micro_batch_size", "fsdp_sharding",
)  # fmt: skip
# What a recipe fits to its iterations: these may change together with them.
SCHEDULE = ("*.dm_only_iterations", "*.policy_ramp_iterations", "*.decay_steps")


def create_or_resume(folder: Path, name: str, r: Recipe, overwrite: bool) -> None:
    """Make `folder` this run's: resume a run of the same recipe, refuse another run's unless it is to be overwritten.

    A run goes on with changes in CHANGEABLE, and with more iterations in SCHEDULE; they are printed. A run that stopped before
    its first iteration, such as on a setting that does not fit, may become any other. Raises ValueError if the folder holds
    something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another --out")
    record = folder / "recipe.yaml"
    names = [p.name for p in folder.iterdir()] if folder.exists() else []
    others = [name for name in names if not any(fnmatch(name, pattern) for pattern in RUN_FILES)]
    if others and (overwrite or not record.exists()):
        raise ValueError(f"{folder} holds what no run of advdmd wrote ({others[0]}): choose another --out")
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    begun = any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints"))  # else nothing can be lost
    if record.exists() and begun:
        there, old = registry.resolve(str(record))
        changed = _changed(old, r)
        if there != name or any(not _may_change(k, changed) for k in changed):
            difference = "; ".join(diff(old, r)) or f"recipe: {there} -> {name}"
            raise ValueError(f"{folder} holds another run ({difference}): choose another --out, or --overwrite to lose it")
        done = checkpoint.newest_step(folder / "checkpoints")
        if done > r.iterations:
            raise ValueError(f"{folder} has already run {done} iterations, {r.iterations} are asked for: choose another --out")
        if not changed:
            return  # an older version may have written other keys
        print(f"{folder} goes on with changes: {'; '.join(diff(old, r))}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(record, dump(name, r))


def _changed(old: Recipe, new: Recipe) -> list[str]:
    before, after = flatten(asdict(old)), flatten(asdict(new))
    return [k for k in before | after if before.get(k) != after.get(k)]


def _may_change(key: str, changed: Sequence[str]) -> bool:
    return key in CHANGEABLE or ("iterations" in changed and any(fnmatch(key, pattern) for pattern in SCHEDULE))


def run_fingerprint(r: Recipe, plan: object) -> str:
    """Hash of what may not change in a run: its recipe without CHANGEABLE and SCHEDULE, and how its data were made."""
    kept = {k: v for k, v in flatten(asdict(r)).items() if not _may_change(k, ["iterations"])}
    return hashlib.sha256(json.dumps([kept, plan], sort_keys=True).encode()).hexdigest()
