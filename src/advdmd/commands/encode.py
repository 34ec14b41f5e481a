"""Encoding once: prompts and captioned images through a teacher's encoders into a cache that training reads."""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advdmd.data import aspect_buckets, embedding_cache
from advdmd.data.captioned_images import CaptionedImage, group_by_prompt, image_size, load_image, read_captioned_images
from advdmd.models import fingerprints, loading
from advdmd.models.sampler import SamplerConfig, draw_noise, sample_latents
from advdmd.progress import Progress


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
    by_shape: bool = False,
) -> bool:
    """Write or complete the cache `out`; says whether all of it is there now (other shards' processes may still be at it).

    `reals`: whose images the critic takes for real: the source's, or `per_prompt` drawn by the teacher for every prompt.
    `by_shape`: a cache for each of several shapes of about the square's area, a prompt's chosen by its first image.
    Raises ValueError before any work on a source, teacher or folder that cannot be used.
    """
    if reals not in ("source", "teacher"):
        raise ValueError(f"reals={reals!r}: source or teacher")
    if by_shape and reals != "source":
        raise ValueError("by_shape: what the teacher draws is square; it is for images of the source")
    if per_prompt < 1 or batch < 1 or not 0 <= shard[0] < shard[1]:
        raise ValueError(f"per_prompt={per_prompt}, batch={batch}: at least 1; shard={shard}: process I of N, 0 <= I < N")
    prompts, images = group_by_prompt(read_captioned_images(source))
    if reals == "source" and not any(images):
        raise ValueError(f"{source} has no images: the critic needs real ones; --reals teacher lets the teacher draw them")
    if reals == "source" and (bare := [p for p, found in zip(prompts, images, strict=True) if not found]):
        raise ValueError(
            f"{source}: {len(bare)} prompts have no image, the first is {bare[0][:80]!r}; remove or illustrate them"
        )
    folder = loading.pipeline_folder(teacher)
    # On a card encoders and transformer are half as wide: what they say is kept in bfloat16 anyway.
    low = torch.float32 if device == "cpu" else torch.bfloat16
    backbone, own = loading.load(teacher, dtype=low, text=low, resolution=resolution)
    side = backbone.pipe.vae_scale_factor * backbone.latent_shape[-1]  # of the square, in pixels
    plan: dict[str, Any] = {
        "format": embedding_cache.FORMAT,
        "teacher": fingerprints.encoder_fingerprint(folder),
        "tokens": fingerprints.tokenization_fingerprint(backbone),
        "resolution": side,
        "reals": reals,
    }
    if reals == "teacher":
        if shard[0] == 0:
            print(embedding_cache.TEACHER_IMAGES_WARNING, file=sys.stderr)
        drawer = fingerprints.encoder_fingerprint(folder, ("transformer",))["transformer"]
        plan["reals"] = {"transformer": drawer, "each": per_prompt, "seed": seed, **asdict(own)}
    parts: dict[Path, tuple[aspect_buckets.Size, Sequence[int]]] = {out: ((side, side), range(len(prompts)))}
    if by_shape:
        found = _by_shape(images, aspect_buckets.bucket_sizes(side, 2 * backbone.pipe.vae_scale_factor))
        parts = {out / aspect_buckets.bucket_name(size): (size, members) for size, members in found.items()}
        embedding_cache.create_or_resume(out, plan | {"content": _content(prompts, images), "sizes": [p.name for p in parts]})
    for part, (size, members) in parts.items():
        mine = [prompts[n] for n in members], [images[n] for n in members]
        embedding_cache.create_or_resume(part, plan | {"content": _content(*mine)} | ({"size": size} if by_shape else {}))
    for part in (*backbone.encoders, backbone.vae if reals == "source" else backbone.net):
        part.to(device)
    work = [
        (part, size, k, members[k * embedding_cache.PROMPTS_PER_SHARD : (k + 1) * embedding_cache.PROMPTS_PER_SHARD])
        for part, (size, members) in parts.items()
        for k in range(shard[0], -(-len(members) // embedding_cache.PROMPTS_PER_SHARD), shard[1])
    ]
    for part in parts if shard[0] == 0 else ():
        if embedding_cache.verified_record(embedding_cache.null_path(part)) is None:
            embedding_cache.write_null(part, _embed(backbone, [""], device))
    say, done = Progress("encoding prompts", sum(len(here) for *_, here in work)), 0
    for part, size, k, here in work:
        content = _hash(_state(e) for n in here for e in images[n]) if reals == "source" else ""
        if (embedding_cache.verified_record(embedding_cache.shard_path(part, k)) or {}).get("content") != content:
            cond = _embed(backbone, [prompts[n] for n in here], device, batch)
            if reals == "teacher":
                latents = _drawn(backbone, own, cond, here, per_prompt, seed, device, batch)
            else:
                latents = [_latents(backbone, images[n], size, device, batch) for n in here]
            embedding_cache.write_shard(part, k, cond, latents, content)
        done += len(here)
        say(done)
    finished = [embedding_cache.finalize(part, [prompts[n] for n in members]) for part, (_, members) in parts.items()]
    return all(finished)


def _by_shape(
    images: Sequence[Sequence[CaptionedImage]], choices: Sequence[aspect_buckets.Size]
) -> dict[aspect_buckets.Size, list[int]]:
    """Which prompts have each size, by their first images."""
    found: dict[aspect_buckets.Size, list[int]] = {}
    for n, own in enumerate(images):
        found.setdefault(aspect_buckets.nearest_bucket(choices, image_size(own[0])), []).append(n)
    return dict(sorted(found.items()))


def _content(prompts: Sequence[str], images: Sequence[Sequence[CaptionedImage]]) -> str:
    return _hash(zip(prompts, ([e.place for e in found] for found in images), strict=True))


def _hash(things: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for thing in things:
        digest.update(repr(thing).encode())
    return digest.hexdigest()


def _state(entry: CaptionedImage) -> tuple[Any, ...]:
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
def _latents(backbone: Any, images: Sequence[CaptionedImage], size: aspect_buckets.Size, device: str, batch: int) -> Tensor:
    parts = [images[i : i + batch] for i in range(0, len(images), batch)]
    arrays = (np.stack([load_image(e, *size) for e in part]) for part in parts)
    return torch.cat([backbone.encode(torch.from_numpy(a).to(device)).cpu() for a in arrays])


@torch.no_grad()
def _drawn(
    backbone: Any, how: SamplerConfig, cond: Any, prompts: Sequence[int], each: int, seed: int, device: str, batch: int
) -> list[Tensor]:
    """The teacher's own images of prompts, by its own sampler: what it cannot draw the critic will never see."""
    null = _embed(backbone, [""], device).to(device)
    keys = [("reals", seed, n, r) for n in prompts for r in range(each)]
    member = torch.arange(len(prompts)).repeat_interleave(each)
    out = []
    for i in torch.arange(len(keys)).split(batch):
        noise = draw_noise([keys[int(k)] for k in i], backbone.latent_shape, 1).to(device)
        out.append(sample_latents(backbone, backbone.net, cond[member[i]].to(device), null, noise, how).cpu())
    return list(torch.cat(out).split(each))
