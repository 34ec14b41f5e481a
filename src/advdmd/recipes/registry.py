"""Recipes by name or from a YAML file, with overrides."""

import difflib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from advdmd.recipes import published, renamed
from advdmd.recipes.overrides import flatten, override, parse_overrides, read_yaml
from advdmd.recipes.recipe import MAX_ITERATIONS, Recipe
from advdmd.types import Json

MakeRecipe = Callable[..., Recipe]  # takes `iterations`, which its schedules are fitted to, and has a default for it

_registered: dict[str, MakeRecipe] = {}


def register(name: str, make: MakeRecipe) -> None:
    """Add a recipe by name: all commands know it from then on. Raises ValueError if the name is taken."""
    if name in known_recipes():
        raise ValueError(f"recipe {name!r} is registered already")
    _registered[name] = make


def has_miniature() -> bool:
    """Whether the miniature (advdmd.mini) is installed; the library works without it."""
    return importlib.util.find_spec("advdmd.mini") is not None


def known_recipes() -> Mapping[str, MakeRecipe]:
    """Recipe name -> function that makes it."""
    shipped: dict[str, MakeRecipe] = {}
    if has_miniature():
        from advdmd.recipes import mini

        shipped = dict(mini.RECIPES)
    return shipped | published.RECIPES | _registered


def recipe_by_name(name: str, iterations: object = None) -> Recipe:
    """A recipe by name, its schedules fitted to `iterations` if they are given. Raises ValueError that lists the names."""
    known = known_recipes()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"recipe {name!r} is unknown.{hint} advdmd show prints a table of all {len(known)}")
    fits = isinstance(iterations, int) and not isinstance(iterations, bool) and 1 <= iterations <= MAX_ITERATIONS
    return known[name](iterations=iterations) if fits else known[name]()  # what does not fit, `override` refuses


def resolve(source: str, words: Sequence[str] = ()) -> tuple[str, Recipe]:
    """A recipe's name, or a YAML file with `recipe: NAME` and changes, then dotted overrides -> (name, recipe).

    A file may have the keys of earlier versions (recipes.renamed). Raises ValueError on what is unknown or does not fit.
    """
    changes: Json = {}
    if source.endswith((".yaml", ".yml")):
        try:
            tree = read_yaml(Path(source).read_text())
        except (OSError, ValueError) as e:
            raise ValueError(f"recipe file {source}: {e}") from None
        if not isinstance(tree, dict) or not isinstance(tree.get("recipe"), str):
            raise ValueError(f"recipe file {source}: needs a line 'recipe: NAME' with one of {', '.join(known_recipes())}")
        source = tree.pop("recipe")
        changes = renamed.new_settings(flatten(tree))
    changes |= parse_overrides(words)
    return source, override(recipe_by_name(source, changes.get("iterations")), changes)
