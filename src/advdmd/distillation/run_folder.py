"""The folder of a training run: what belongs to it, which run it is of, and the recipe that it was started with."""

import hashlib
import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from advdmd.files import write_text
from advdmd.recipes import registry
from advdmd.recipes.overrides import diff, dump
from advdmd.recipes.recipe import Recipe

# What a run writes, and --overwrite may remove.
RUN_FILES = (
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


def create_or_resume(folder: Path, recipe_text: str, overwrite: bool, difference: Callable[[], str]) -> None:
    """Make `folder` this run's: resume a run with the same recipe, refuse another run's unless it is to be overwritten.

    difference() says in words how the recipe that is there differs. Raises ValueError if the folder holds something else.
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
    if record.exists() and record.read_text() != recipe_text:
        raise ValueError(f"{folder} holds another run ({difference()}): choose another --out, or --overwrite to lose it")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(record, recipe_text)


def recipe_text(name: str, r: Recipe, folder: Path) -> str:
    """The recipe as text: as the folder has it if that is the same recipe (an older version may have other keys), or new."""
    record = folder / "recipe.yaml"
    try:
        if record.is_file() and registry.resolve(str(record)) == (name, r):
            return record.read_text()
    except ValueError:
        pass  # not a run of this package, or not readable any more: `create_or_resume` refuses it
    return dump(name, r)


def recipe_difference(r: Recipe, folder: Path) -> str:
    """How the recipe in a run's folder differs from `r`, in words."""
    return "; ".join(diff(registry.resolve(str(folder / "recipe.yaml"))[1], r)) or "another recipe"


def run_fingerprint(recipe: str, plan: object) -> str:
    """Hash of a run's recipe and, where it has one, of its cache's plan."""
    return hashlib.sha256((recipe + (json.dumps(plan) if plan is not None else "")).encode()).hexdigest()
