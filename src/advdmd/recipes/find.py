"""Recipes by name or from a YAML file, with overrides."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from advdmd.recipe import MOST_ITERATIONS, Recipe, flatten, override, parse_overrides, read_yaml
from advdmd.recipes import mini, real


def known() -> dict[str, Any]:
    """Recipe name -> function that makes it."""
    return mini.RECIPES | real.RECIPES


def named(name: str, iterations: Any = None) -> Recipe:
    """A recipe by name, its schedules fitted to `iterations` if told; raises ValueError that lists the names."""
    if name not in known():
        near = difflib.get_close_matches(name, known(), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"recipe {name!r} is unknown.{hint} There are: {', '.join(known())}")
    fits = isinstance(iterations, int) and not isinstance(iterations, bool) and 1 <= iterations <= MOST_ITERATIONS
    return known()[name](iterations=iterations) if fits else known()[name]()  # what does not fit, `override` refuses


def resolve(source: str, words: Sequence[str] = ()) -> tuple[str, Recipe]:
    """A recipe's name, or a YAML file with `recipe: NAME` and changes, then dotted overrides -> (name, recipe)."""
    changes: dict[str, Any] = {}
    if source.endswith((".yaml", ".yml")):
        try:
            tree = read_yaml(Path(source).read_text())
        except (OSError, ValueError) as e:
            raise ValueError(f"recipe file {source}: {e}") from None
        if not isinstance(tree, dict) or not isinstance(tree.get("recipe"), str):
            raise ValueError(f"recipe file {source}: needs a line 'recipe: NAME' with one of {', '.join(known())}")
        source = tree.pop("recipe")
        changes = flatten(tree)
    changes |= parse_overrides(words)
    return source, override(named(source, changes.get("iterations")), changes)
