"""The folder of a training run: what belongs to it, whose it is, and the recipe it was started with."""

import hashlib
import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from advdmd.data.aspect_buckets import BucketedCache
from advdmd.files import write_text
from advdmd.recipes import registry
from advdmd.recipes.overrides import dump
from advdmd.recipes.recipe import Recipe

# What a run writes, and --overwrite may lose.
OURS = (
    ".*",
    "recipe.yaml",
    "metrics.jsonl",
    "checkpoints",
    "samples",
    "student",
    "best.json",
    "best*.safetensors",
    "tensorboard",
    "wandb",
)


def _claim(folder: Path, text: str, overwrite: bool = False, change: Callable[[], str] = lambda: "another recipe") -> None:
    """Make `folder` this run's: accept our own to resume, refuse another run's unless told to overwrite it."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another --out")
    record = folder / "recipe.yaml"
    there = [p.name for p in folder.iterdir()] if folder.exists() else []
    strangers = [name for name in there if not any(fnmatch(name, ours) for ours in OURS)]
    if strangers and (overwrite or not record.exists()):
        raise ValueError(f"{folder} holds what no run of ours wrote ({strangers[0]}): choose another --out")
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    if record.exists() and record.read_text() != text:
        raise ValueError(f"{folder} holds another run ({change()}): choose another --out, or --overwrite to lose it")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(record, text)


def _recorded(name: str, r: Recipe, folder: Path) -> str:
    """The recipe as text: as the folder has it if that is the same recipe (an older version may say less), or new."""
    record = folder / "recipe.yaml"
    try:
        if record.is_file() and registry.resolve(str(record)) == (name, r):
            return record.read_text()
    except ValueError:
        pass  # not ours, or not readable any more: `_claim` will say so
    return dump(name, r)


def _fingerprint(text: str, encoded: BucketedCache | None) -> str:
    """Of a run: its recipe and, where it has one, its cache's plan."""
    return hashlib.sha256((text + (json.dumps(encoded.plan) if encoded else "")).encode()).hexdigest()
