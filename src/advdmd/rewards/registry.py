"""Scorers by name: what `advdmd metric` measures with, what validates a run, and further rewards of a recipe."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from advdmd.models.hub import download
from advdmd.rewards.base import Scorer
from advdmd.rewards.clip import clip_score, hps_v2, pick_score
from advdmd.rewards.imagereward import image_reward


class _Registered(NamedTuple):
    argument: str  # what is written behind the name and a colon; empty: nothing is
    make: Callable[[str, str], Scorer]  # (that text, device)


def _of_folder(make: Callable[[Path, str], Scorer]) -> _Registered:
    return _Registered("FOLDER", lambda where, device: make(download(Path(where).expanduser()), device))


METRICS = ("clipscore", "pickscore", "hpsv2", "imagereward")  # learned metrics, from folders of weights
_scorers: dict[str, _Registered] = {
    name: _of_folder(make) for name, make in zip(METRICS, (clip_score, pick_score, hps_v2, image_reward), strict=True)
}


def register_scorer(name: str, make: Callable[[str, str], Scorer], argument: str = "") -> None:
    """Add a scorer: make(what is written behind its name and a colon, device).

    argument: what that text is, in messages; empty: none is written. Raises ValueError if the name is taken.
    """
    if name in _scorers:
        raise ValueError(f"scorer {name!r} is registered already")
    _scorers[name] = _Registered(argument, make)


def load_scorer(kind: str, where: str = "", device: str = "cpu") -> Scorer:
    """A scorer as `parse_scorer` reads it. Raises ValueError if what it needs is missing or does not fit."""
    parse_scorer(f"{kind}:{where}" if where else kind)
    return _scorers[kind].make(where, device)


def parse_scorer(text: str) -> tuple[str, str]:
    """ "pickscore:FOLDER" -> ("pickscore", "FOLDER"); "checker" -> ("checker", ""). Raises ValueError naming the rule."""
    kind, colon, where = text.partition(":")
    known = _scorers.get(kind)
    if known is None or bool(known.argument) != bool(where) or bool(colon) != bool(where):
        raise ValueError(f"scorer {text!r}: write {' or '.join(_forms())}")
    return kind, where


def parse_reward(text: str) -> tuple[float, str, str]:
    """ "0.5*pickscore:FOLDER" -> (0.5, "pickscore", "FOLDER"). Raises ValueError naming the rule."""
    weight, star, rest = text.partition("*")
    try:
        value = float(weight)
    except ValueError:
        value = float("nan")
    if not (star and 0 < value < float("inf")):
        raise ValueError(f"rewards: {text!r}: write WEIGHT*SCORER with a weight above 0 and a scorer {' or '.join(_forms())}")
    try:
        return value, *parse_scorer(rest)
    except ValueError as e:
        raise ValueError(f"rewards: {text!r}: write WEIGHT*SCORER; {e}") from None


def _forms() -> list[str]:
    names = f"NAME:FOLDER with NAME one of {', '.join(METRICS)}"
    return [names, *(f"{k}:{v.argument}" if v.argument else k for k, v in _scorers.items() if k not in METRICS)]
