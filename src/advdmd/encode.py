"""Encoding once: prompts and captioned images through a teacher's encoders into a cache that training reads."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advdmd.data import cache
from advdmd.data.sources import Entry, load_image, read_entries, unique
from advdmd.models import load
from advdmd.models.sampler import Sampling, draw_noise, walk
from advdmd.train.book import Progress


def encode(
    source: Path,
    teacher: str,
    out: Path,
    resolution: int | None = None,
    reals: str = "source",
    per_prompt: int = 1,
    shard: tuple[int, int] = (0, 1),
    device: str = "cpu",
    batch: int = 8,
    seed: int = 0,
) -> bool:
    """Write or complete the cache `out`; says whether all of it is there now (other shards' processes may still be at it).

    `reals`: whose images the critic takes for real: the source's, or `per_prompt` drawn by the teacher for every prompt.
    Raises ValueError before any work on a source, teacher or folder that cannot be used.
    """
    if reals not in ("source", "teacher"):
        raise ValueError(f"reals={reals!r}: source or teacher")
    if per_prompt < 1 or batch < 1 or not 0 <= shard[0] < shard[1]:
        raise ValueError(f"per_prompt={per_prompt}, batch={batch}: at least 1; shard={shard}: process I of N, 0 <= I < N")
    prompts, images = unique(read_entries(source))
    if reals == "source" and not any(images):
        raise ValueError(f"{source} has no images: the critic needs real ones; --reals teacher lets the teacher draw them")
    if reals == "source" and (bare := [p for p, found in zip(prompts, images, strict=True) if not found]):
        raise ValueError(
            f"{source}: {len(bare)} prompts have no image, the first is {bare[0][:80]!r}; remove or illustrate them"
        )
    folder = load.folder_of(teacher)
    # On a card encoders and transformer are half as wide: what they say is kept in bfloat16 anyway.
    low = torch.float32 if device == "cpu" else torch.bfloat16
    backbone, own = load.load(teacher, dtype=low, text=low, resolution=resolution)
    plan: dict[str, Any] = {
        "format": cache.FORMAT,
        "teacher": load.identity(folder),
        "resolution": _side(backbone),
        "content": _hash(zip(prompts, ([e.place for e in found] for found in images), strict=True)),
        "reals": reals,
    }
    if reals == "teacher":
        drawer = load.identity(folder, ("transformer",))["transformer"]
        plan["reals"] = {"transformer": drawer, "each": per_prompt, "seed": seed, **asdict(own)}
    cache.claim(out, plan)
    for part in (*backbone.encoders, backbone.vae if reals == "source" else backbone.net):
        part.to(device)
    if shard[0] == 0 and cache.record(cache.null_path(out)) is None:
        cache.write_null(out, _embed(backbone, [""], device))
    todo = range(shard[0], -(-len(prompts) // cache.SHARD), shard[1])
    ranges = {k: range(k * cache.SHARD, min(len(prompts), (k + 1) * cache.SHARD)) for k in todo}
    say, done = Progress("encoding prompts", sum(map(len, ranges.values()))), 0
    for k, here in ranges.items():
        content = _hash(_state(e) for n in here for e in images[n]) if reals == "source" else ""
        if (cache.record(cache.shard_path(out, k)) or {}).get("content") != content:
            cond = _embed(backbone, [prompts[n] for n in here], device, batch)
            if reals == "teacher":
                latents = _drawn(backbone, own, cond, here, per_prompt, seed, device, batch)
            else:
                latents = [_latents(backbone, images[n], device, batch) for n in here]
            cache.write_shard(out, k, cond, latents, content)
        done += len(here)
        say(done)
    return cache.finish(out, prompts)


def _side(backbone: Any) -> int:
    """Of the images, in pixels."""
    return backbone.pipe.vae_scale_factor * backbone.latent_shape[-1]


def _hash(things: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for thing in things:
        digest.update(repr(thing).encode())
    return digest.hexdigest()


def _state(entry: Entry) -> tuple[Any, ...]:
    """What changes when an image does: a shard whose images have changed is encoded again."""
    assert entry.image is not None
    stat = (entry.image if entry.row is None else entry.image / "state.json").stat()
    return entry.place, stat.st_size, stat.st_mtime_ns


@torch.no_grad()
def _embed(backbone: Any, prompts: Sequence[str], device: str, batch: int = 8) -> Any:
    """Conditions of prompts, in batches."""
    ids = backbone.tokenize(prompts)
    parts = [backbone.embed(i.to(device)).to("cpu") for i in ids.split(batch)]
    return type(parts[0]).cat(parts)


@torch.no_grad()
def _latents(backbone: Any, images: Sequence[Entry], device: str, batch: int) -> Tensor:
    side = _side(backbone)
    parts = [images[i : i + batch] for i in range(0, len(images), batch)]
    arrays = (np.stack([load_image(e, side, side) for e in part]) for part in parts)
    return torch.cat([backbone.encode(torch.from_numpy(a).to(device)).cpu() for a in arrays])


@torch.no_grad()
def _drawn(
    backbone: Any, how: Sampling, cond: Any, prompts: Sequence[int], each: int, seed: int, device: str, batch: int
) -> list[Tensor]:
    """The teacher's own images of prompts, by its own sampler: what it cannot draw the critic will never see."""
    null = _embed(backbone, [""], device).to(device)
    keys = [("reals", seed, n, r) for n in prompts for r in range(each)]
    member = torch.arange(len(prompts)).repeat_interleave(each)
    out = []
    for i in torch.arange(len(keys)).split(batch):
        noise = draw_noise([keys[int(k)] for k in i], backbone.latent_shape, 1).to(device)
        out.append(walk(backbone, backbone.net, cond[member[i]].to(device), null, noise, how).cpu())
    return list(torch.cat(out).split(each))
