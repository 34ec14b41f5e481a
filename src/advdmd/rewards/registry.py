"""Scorers by name: what `advdmd metric` measures with, and what a recipe may use as a reward beside the discriminator."""

from collections.abc import Callable
from pathlib import Path

from advdmd.rewards.base import Scorer
from advdmd.rewards.clip import clip_score, hps_v2, pick_score
from advdmd.rewards.imagereward import image_reward

SCORERS = {"clipscore": clip_score, "pickscore": pick_score, "hpsv2": hps_v2, "imagereward": image_reward}
_without_weights: dict[str, Callable[[], Scorer]] = {}


def register_scorer(name: str, make: Callable[[], Scorer]) -> None:
    """Add a scorer that needs no folder of weights. Raises ValueError if the name is taken."""
    if name in known_scorers():
        raise ValueError(f"scorer {name!r} is registered already")
    _without_weights[name] = make


def known_scorers() -> tuple[str, ...]:
    """The names of all scorers."""
    return (*SCORERS, *_without_weights)


def load_scorer(kind: str, weights: Path | None = None, device: str = "cpu") -> Scorer:
    """A scorer by name. Raises ValueError if there is no such scorer, or if its weights do not fit."""
    if kind in _without_weights and weights is None:
        return _without_weights[kind]()
    if kind not in SCORERS or weights is None:
        raise ValueError(f"scorer {kind!r}: write {' or '.join(_forms())}")
    return SCORERS[kind](weights, device)


def parse_scorer(text: str) -> tuple[str, Path | None]:
    """ "pickscore:FOLDER" -> ("pickscore", FOLDER); "checker" -> ("checker", None). Raises ValueError naming the rule."""
    kind, colon, where = text.partition(":")
    if not (kind in SCORERS and where) and not (kind in _without_weights and not colon):
        raise ValueError(f"scorer {text!r}: write {' or '.join(_forms())}")
    return kind, Path(where) if colon else None


def parse_reward(text: str) -> tuple[float, str, Path | None]:
    """ "0.5*pickscore:FOLDER" -> (0.5, "pickscore", FOLDER). Raises ValueError naming the rule."""
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
    names = f"NAME:FOLDER with NAME one of {', '.join(SCORERS)}"
    return [names, *_without_weights]
