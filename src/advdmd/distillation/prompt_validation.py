"""Validation on prompts of one's own: images of the EMA student at fixed noise, scored by scorers of one's choice."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from advdmd.data.captioned_images import Columns, group_by_prompt, prompt_hash
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
from advdmd.types import Cond, Edit, Metrics, Prompt, Ranks

ENCODED_FILE = "validation.safetensors"  # in a run's folder: its validation prompts, encoded once


def read_prompts(path: Path, edits: bool = False) -> list[Prompt]:
    """Each prompt once of any source that `advdmd encode` reads (data.sources). edits: whether they need source images.

    Raises ValueError if there are none, or if some have more source images than others.
    """
    try:
        prompts = group_by_prompt(read_captioned_images(path, Columns(edits=edits)))[0]
    except ValueError as e:
        raise ValueError(f"validation.prompts: {e}") from None
    if edits and (bare := [p for p in prompts if isinstance(p, str)]):
        raise ValueError(f"validation.prompts: {path}: the teacher edits images, and {bare[0][:80]!r} has no source image")
    counts = sorted({len(p.sources) for p in prompts if isinstance(p, Edit)})
    if len(counts) > 1:
        raise ValueError(f"validation.prompts: {path}: {counts[0]} to {counts[-1]} source images a prompt: all need one number")
    return prompts


def load_scorers(r: Recipe) -> dict[str, Scorer]:
    """The scorers of a recipe's validation by name, on the CPU. Raises ValueError if one cannot be loaded."""
    kinds = [parse_scorer(text) for text in r.validation.scorers]
    return {kind: load_scorer(kind, weights) for kind, weights in kinds}


def prompt_validation(
    prompts: Sequence[Prompt], scorers: dict[str, Scorer], images: int, ranks: Ranks, device: torch.device | str
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
        drawn = list(generate([prompts[i] for i, _ in mine], [("validation", i, k) for i, k in mine]))
        texts = [str(prompts[i]) for i, _ in mine]
        found = ranks.gather(torch.stack([s.score(drawn, texts).float() for s in scorers.values()]).to(device))
        scores = {name: row[real].mean().item() for name, row in zip(scorers, found.cpu(), strict=True)}
        return scores | {"score": next(iter(scores.values()))}

    return validate


def encoded_prompts(
    r: Recipe, backbone: Backbone, prompts: Sequence[Prompt], folder: Path
) -> Callable[[Sequence[Prompt]], Cond]:
    """A function from validation prompts to their conditions on the backbone's device, for runs without text encoders.

    The encoders are loaded once, for all prompts; later starts of the run read ENCODED_FILE. The empty prompt is among them.
    """
    texts: list[Prompt] = [] if backbone.edits else [backbone.null_prompt]  # of edits each has its own empty prompt
    every = list(dict.fromkeys([*texts, *prompts]))
    about = {"teacher": r.teacher, "prompts": [p if isinstance(p, str) else prompt_hash(p) for p in every]}
    file, key = folder / ENCODED_FILE, list(bytes.fromhex(object_hash(about)))
    kept = read_tensors(file, "key", "embeds", hint="delete that file") if file.is_file() else {}
    if kept and kept["key"].tolist() == key:
        cond = Cond.from_tensors({k: v for k, v in kept.items() if k != "key"})
    else:
        full, _ = loading.load(r.teacher, text_dtype=backbone.dtype)
        cond = Cond.cat([encode_prompts(full, [p], "cpu") for p in every])
        tensors = {k: v.contiguous() for k, v in cond.tensors().items()}
        write_atomically(file, lambda p: save_file(tensors | {"key": torch.tensor(key)}, p))
    place = {p: i for i, p in enumerate(every)}
    return lambda texts: cond[torch.tensor([place[p] for p in texts])].to(backbone.device)
