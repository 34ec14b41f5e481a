"""Scorers by name: what `advdmd metric` measures with, and what a recipe may use as a reward beside the discriminator."""

from pathlib import Path

from advdmd.rewards.base import Scorer
from advdmd.rewards.clip import clip_score, hps_v2, pick_score
from advdmd.rewards.imagereward import image_reward

SCORERS = {"clipscore": clip_score, "pickscore": pick_score, "hpsv2": hps_v2, "imagereward": image_reward}


def load_scorer(kind: str, weights: Path, device: str = "cpu") -> Scorer:
    """A scorer by name. Raises ValueError if there is no such scorer, or if its weights do not fit."""
    if kind not in SCORERS:
        raise ValueError(f"metric {kind!r}: one of {', '.join(SCORERS)}")
    return SCORERS[kind](weights, device)


def parse_reward(text: str) -> tuple[float, str, Path]:
    """ "0.5*pickscore:FOLDER" -> (0.5, "pickscore", FOLDER). Raises ValueError naming the rule."""
    weight, star, rest = text.partition("*")
    kind, colon, where = rest.partition(":")
    try:
        value = float(weight)
    except ValueError:
        value = float("nan")
    if not (star and colon and where and kind in SCORERS and 0 < value < float("inf")):
        raise ValueError(f"rewards: {text!r}: write WEIGHT*NAME:FOLDER with a weight above 0 and one of {', '.join(SCORERS)}")
    return value, kind, Path(where)
