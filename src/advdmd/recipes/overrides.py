"""Recipes as text: plain YAML, dotted overrides with typed values, the resolved recipe written down."""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any, cast

from advdmd.recipes.recipe import Recipe

MAX_YAML_DEPTH = 20  # levels of nesting that a recipe's text may have; recipes have three


def read_yaml(text: str) -> Any:
    """Plain YAML: no tags, anchors or aliases, which a recipe needs none of and which can run wild. Raises ValueError."""
    import yaml

    class Plain(yaml.SafeLoader):
        depth = 0

        def compose_node(self, *at: Any) -> Any:
            event: Any = self.peek_event()
            if event.anchor or getattr(event, "tag", None):
                raise yaml.YAMLError("a recipe has no tags, anchors or aliases")
            if self.depth == MAX_YAML_DEPTH:
                raise yaml.YAMLError(f"nested more than {MAX_YAML_DEPTH} deep")
            self.depth += 1
            node = super().compose_node(*at)
            self.depth -= 1
            return node

    try:
        return yaml.load(text, Plain)
    except (yaml.YAMLError, ValueError, OverflowError) as e:  # dates and numbers that are none are not YAMLErrors
        raise ValueError(str(e)) from None


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """["a.b=c"] -> {"a.b": c}, values read as YAML. Raises ValueError on a word without "="."""
    out = {}
    for word in words:
        key, eq, value = word.partition("=")
        if not eq or not key:
            raise ValueError(f"override {word!r}: write key=value, for example algorithm.steps=2")
        try:
            out[key] = read_yaml(value)
        except ValueError:
            raise ValueError(f"override {word!r}: {value!r} is not a value (number, text, true, [list])") from None
    return out


def flatten(tree: Mapping[str, Any], head: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for k, v in tree.items():
        out |= flatten(v, f"{head}{k}.") if isinstance(v, Mapping) else {f"{head}{k}": v}
    return out


def override(value: Any, changes: Mapping[str, Any], path: str = "") -> Any:
    """A copy of a frozen dataclass with dotted keys replaced, types checked. Raises ValueError naming key and rule."""
    from pydantic import TypeAdapter, ValidationError

    names = {f.name: f for f in fields(value)}
    new: dict[str, Any] = {f: getattr(value, f) for f in names}
    inner: dict[str, dict[str, Any]] = {}
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
    """The resolved recipe as YAML that `resolve` reads back to an equal value."""
    import yaml

    return yaml.safe_dump({"recipe": name, **json.loads(json.dumps(asdict(recipe)))}, sort_keys=False)


def diff(a: Recipe, b: Recipe) -> list[str]:
    """Lines "key: a -> b" for every setting in which two recipes differ."""
    fa, fb = flatten(asdict(a)), flatten(asdict(b))
    return [f"{k}: {fa.get(k)} -> {fb.get(k)}" for k in fa | fb if fa.get(k) != fb.get(k)]
