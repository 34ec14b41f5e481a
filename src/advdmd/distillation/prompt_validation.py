"""Validation on prompts of one's own: images of the EMA student at fixed noise, scored by scorers of one's choice."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from advdmd.data.captioned_images import group_by_prompt
from advdmd.data.loader import Validation
from advdmd.data.sources import read_captioned_images
from advdmd.files import object_hash, read_tensors, write_atomically
from advdmd.models import loading
from advdmd.models.backbone import Backbone
from advdmd.models.images import ImageSampler
from advdmd.models.sampler import encode_prompts
from advdmd.recipes.recipe import Recipe
from advdmd.rewards.base import Scorer
from advdmd.rewards.registry import load_scorer, parse_scorer
from advdmd.types import Cond, Metrics, Ranks

ENCODED_FILE = "validation.safetensors"  # in a run's folder: its validation prompts, encoded once


def read_prompts(path: Path) -> list[str]:
    """Each prompt once of any source that `advdmd encode` reads (data.sources). Raises ValueError if there are none."""
    try:
        return group_by_prompt(read_captioned_images(path))[0]
    except ValueError as e:
        raise ValueError(f"validation.prompts: {e}") from None


def load_scorers(r: Recipe) -> dict[str, Scorer]:
    """The scorers of a recipe's validation by name, on the CPU. Raises ValueError if one cannot be loaded."""
    kinds = [parse_scorer(text) for text in r.validation.scorers]
    return {kind: load_scorer(kind, weights) for kind, weights in kinds}


def prompt_validation(
    prompts: Sequence[str], scorers: dict[str, Scorer], images: int, ranks: Ranks, device: torch.device | str
) -> Validation:
    """Mean scores of `images` images of each prompt, by scorer; "score", which selects checkpoints, is the first scorer's.

    The noise is the same every time. Ranks draw and score equal shares, and exchange scores on their `device`.
    """
    jobs = [(i, k) for i in range(len(prompts)) for k in range(images)]
    each = -(-len(jobs) // ranks.world_size)
    shares = [jobs[rank :: ranks.world_size] for rank in range(ranks.world_size)]
    real = torch.tensor([i < len(share) for share in shares for i in range(each)])
    mine = (shares[ranks.rank] + jobs)[:each]  # a shorter share is filled up: ranks exchange as many numbers

    def validate(generate: ImageSampler) -> Metrics:
        texts = [prompts[i] for i, _ in mine]
        drawn = list(generate(texts, [("validation", i, k) for i, k in mine]))
        found = ranks.gather(torch.stack([s.score(drawn, texts).float() for s in scorers.values()]).to(device))
        scores = {name: row[real].mean().item() for name, row in zip(scorers, found.cpu(), strict=True)}
        return scores | {"score": next(iter(scores.values()))}

    return validate


def encoded_prompts(r: Recipe, backbone: Backbone, prompts: Sequence[str], folder: Path) -> Callable[[Sequence[str]], Cond]:
    """A function from validation prompts to their conditions on the backbone's device, for runs without text encoders.

    The encoders are loaded once, for all prompts; later starts of the run read ENCODED_FILE. The empty prompt is among them.
    """
    every = list(dict.fromkeys([backbone.null_prompt, *prompts]))
    file, key = folder / ENCODED_FILE, list(bytes.fromhex(object_hash({"teacher": r.teacher, "prompts": every})))
    kept = read_tensors(file, "key", "embeds", hint="delete that file") if file.is_file() else {}
    if kept and kept["key"].tolist() == key:
        cond = Cond(kept["embeds"], kept.get("pooled"), kept.get("mask"))
    else:
        full, _ = loading.load(r.teacher, text_dtype=backbone.dtype)
        cond = Cond.cat([encode_prompts(full, [p], "cpu") for p in every])
        tensors = {k: v.contiguous() for k, v in asdict(cond).items() if v is not None}
        write_atomically(file, lambda p: save_file(tensors | {"key": torch.tensor(key)}, p))
    place = {p: i for i, p in enumerate(every)}
    return lambda texts: cond[torch.tensor([place[p] for p in texts])].to(backbone.device)
