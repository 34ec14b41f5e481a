"""Recipes as text: plain YAML, dotted overrides with typed values, the resolved recipe written down."""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar, cast

from advdmd.recipes import renamed
from advdmd.recipes.recipe import Recipe
from advdmd.types import Json

MAX_YAML_DEPTH = 20  # levels of nesting; recipes have three
T = TypeVar("T")


def read_yaml(text: str) -> object:
    """Plain YAML without tags, anchors or aliases, which a recipe does not need and which can expand without end.

    Raises ValueError.
    """
    import yaml

    class Plain(yaml.SafeLoader):
        depth = 0

        def compose_node(self, *args: Any) -> Any:
            event: Any = self.peek_event()
            if event.anchor or getattr(event, "tag", None):
                raise yaml.YAMLError("a recipe has no tags, anchors or aliases")
            if self.depth == MAX_YAML_DEPTH:
                raise yaml.YAMLError(f"nested more than {MAX_YAML_DEPTH} deep")
            self.depth += 1
            node = super().compose_node(*args)
            self.depth -= 1
            return node

    try:
        return yaml.load(text, Plain)
    except (yaml.YAMLError, ValueError, OverflowError) as e:  # dates and numbers out of range are not YAMLErrors
        raise ValueError(str(e)) from None


def parse_overrides(words: Sequence[str]) -> Json:
    """["a.b=c"] -> {"a.b": c}, values read as YAML.

    Raises ValueError on a word without "=", and on keys of an earlier version.
    """
    out: Json = {}
    for word in words:
        key, eq, value = word.partition("=")
        if not eq or not key:
            raise ValueError(f"override {word!r}: write key=value, for example algorithm.steps=2")
        if new := renamed.new_key(key):
            raise ValueError(f"override {word!r}: {key} is now called {new}")
        try:
            out[key] = read_yaml(value)
        except ValueError:
            raise ValueError(f"override {word!r}: {value!r} is not a value (number, text, true, [list])") from None
        if (new := renamed.new_value(key, out[key])) is not out[key]:
            raise ValueError(f"override {word!r}: the value {out[key]} is now called {new}")
    return out


def flatten(tree: Mapping[str, Any], head: str = "") -> Json:
    """Nested mappings as one, with dotted keys."""
    out: Json = {}
    for k, v in tree.items():
        out |= flatten(v, f"{head}{k}.") if isinstance(v, Mapping) else {f"{head}{k}": v}
    return out


def override(value: T, changes: Json, path: str = "") -> T:
    """A copy of a frozen dataclass with dotted keys replaced, types checked. Raises ValueError that names key and rule."""
    from pydantic import TypeAdapter, ValidationError

    dataclass_value: Any = value
    names = {f.name: f for f in fields(dataclass_value)}
    new: Json = {f: getattr(value, f) for f in names}
    inner: dict[str, Json] = {}
    for key, v in changes.items():
        head, _, rest = key.partition(".")
        if head not in names:
            near = difflib.get_close_matches(head, names, 1)
            hint = f" Did you mean {path}{near[0]}?" if near else ""
            raise ValueError(f"unknown key {path}{key}.{hint} {type(value).__name__} has: {', '.join(names)}")
        if rest:
            if not is_dataclass(new[head]):
                raise ValueError(f"key {path}{key}: {path}{head} is a plain value, not a group of settings")
            inner.setdefault(head, {})[rest] = v
        elif is_dataclass(new[head]):
            raise ValueError(f"key {path}{head} is a group of settings: write {path}{head}.NAME=value")
        else:
            if isinstance(v, bool) != (names[head].type is bool) or (isinstance(v, float) and not math.isfinite(v)):
                raise ValueError(f"{path}{head}={v!r}: expected a finite value of {names[head].type}")
            try:
                new[head] = TypeAdapter(cast(Any, names[head].type)).validate_python(v)
            except ValidationError as e:
                raise ValueError(f"{path}{head}={v!r}: {e.errors()[0]['msg'].lower()} ({names[head].type})") from None
    for head, rest in inner.items():
        new[head] = override(new[head], rest, f"{path}{head}.")
    return type(value)(**new)


def dump(name: str, recipe: Recipe) -> str:
    """The resolved recipe as YAML that `registry.resolve` reads back to an equal value."""
    import yaml

    return yaml.safe_dump({"recipe": name, **json.loads(json.dumps(asdict(recipe)))}, sort_keys=False)


def diff(a: Recipe, b: Recipe) -> list[str]:
    """Lines "key: a -> b" for every setting in which two recipes differ."""
    fa, fb = flatten(asdict(a)), flatten(asdict(b))
    return [f"{k}: {fa.get(k)} -> {fb.get(k)}" for k in fa | fb if fa.get(k) != fb.get(k)]
