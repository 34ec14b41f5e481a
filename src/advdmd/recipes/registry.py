"""Recipes by name or from a YAML file, with overrides."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from advdmd.recipes import mini, published
from advdmd.recipes.overrides import flatten, override, parse_overrides, read_yaml
from advdmd.recipes.recipe import MOST_ITERATIONS, Recipe


def known_recipes() -> dict[str, Any]:
    """Recipe name -> function that makes it."""
    return mini.RECIPES | published.RECIPES


def recipe_by_name(name: str, iterations: Any = None) -> Recipe:
    """A recipe by name, its schedules fitted to `iterations` if told; raises ValueError that lists the names."""
    if name not in known_recipes():
        near = difflib.get_close_matches(name, known_recipes(), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"recipe {name!r} is unknown.{hint} There are: {', '.join(known_recipes())}")
    fits = isinstance(iterations, int) and not isinstance(iterations, bool) and 1 <= iterations <= MOST_ITERATIONS
    return (
        known_recipes()[name](iterations=iterations) if fits else known_recipes()[name]()
    )  # what does not fit, `override` refuses


def resolve(source: str, words: Sequence[str] = ()) -> tuple[str, Recipe]:
    """A recipe's name, or a YAML file with `recipe: NAME` and changes, then dotted overrides -> (name, recipe)."""
    changes: dict[str, Any] = {}
    if source.endswith((".yaml", ".yml")):
        try:
            tree = read_yaml(Path(source).read_text())
        except (OSError, ValueError) as e:
            raise ValueError(f"recipe file {source}: {e}") from None
        if not isinstance(tree, dict) or not isinstance(tree.get("recipe"), str):
            raise ValueError(f"recipe file {source}: needs a line 'recipe: NAME' with one of {', '.join(known_recipes())}")
        source = tree.pop("recipe")
        changes = flatten(tree)
    changes |= parse_overrides(words)
    return source, override(recipe_by_name(source, changes.get("iterations")), changes)
