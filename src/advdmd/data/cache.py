"""What a teacher's encoders say of prompts and images, on disk: encoded once, read row by row.

A cache is a folder: plan.json (what is in it, and whose encoders), prompts.jsonl, null.safetensors (the empty prompt), shards
of SHARD prompts with all their images, each with a record of its bytes, and manifest.json, written last.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from advdmd.data.shapes import deal
from advdmd.files import file_hash, write_atomically, write_text
from advdmd.rng import ALONE
from advdmd.types import Batch, Cond, Team

SHARD = 64  # prompts in a shard
FORMAT = 1


def shard_path(folder: Path, k: int) -> Path:
    return folder / f"shard-{k:06d}.safetensors"


def claim(folder: Path, plan: Mapping[str, Any]) -> None:
    """Make `folder` the place of this plan, or go on in it. Raises ValueError that says in what another plan differs."""
    path = folder / "plan.json"
    if path.is_file():
        found = json.loads(path.read_text())
        if found != json.loads(json.dumps(plan)):
            changed = ", ".join(sorted(k for k in {*found, *plan} if found.get(k) != plan.get(k)))
            raise ValueError(f"{folder} is a cache of something else ({changed} differ): choose another --out")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and no cache: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(plan, indent=1))


def whole(folder: Path, k: int) -> bool:
    """Whether shard k is there as it was written."""
    path = shard_path(folder, k)
    try:
        return file_hash(path) == json.loads(path.with_suffix(".json").read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        return False


def columns(cond: Cond) -> dict[str, Tensor]:
    """A condition as tensors to save: floats as bfloat16."""
    found = {"embeds": cond.embeds, "pooled": cond.pooled, "mask": cond.mask}
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in found.items() if v is not None}
    return {k: v.cpu().contiguous() for k, v in half.items()}


def write_shard(folder: Path, k: int, cond: Cond, latents: Sequence[Tensor]) -> None:
    """Conditions of its prompts, and of each prompt its images' latents [n_i, C, h, w]; the record last."""
    path = shard_path(folder, k)
    counts = torch.tensor([len(z) for z in latents])
    tensors = columns(cond) | {"counts": counts, "latents": torch.cat(list(latents)).bfloat16().cpu().contiguous()}
    write_atomically(path, lambda p: save_file(tensors, p))
    write_text(path.with_suffix(".json"), json.dumps({"sha256": file_hash(path), "images": [len(z) for z in latents]}))


def finish(folder: Path, prompts: Sequence[str]) -> bool:
    """Write the manifest if every shard is there; says whether it is finished."""
    n = -(-len(prompts) // SHARD)
    records = [shard_path(folder, k).with_suffix(".json") for k in range(n)]
    if not all(r.is_file() for r in (*records, folder / "null.safetensors")):
        return False
    write_text(folder / "prompts.jsonl", "".join(json.dumps(p) + "\n" for p in prompts))
    images = [n for r in records for n in json.loads(r.read_text())["images"]]
    told = {"format": FORMAT, "prompts": len(prompts), "images": sum(images), "prompts_without_image": images.count(0)}
    write_text(folder / "manifest.json", json.dumps(told, indent=1))
    return True


class Cache:
    """A finished cache, read lazily: a shard's bytes are checked when it is first touched."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text())
            self.plan = json.loads((folder / "plan.json").read_text())
            self.prompts: list[str] = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
        except OSError:
            unfinished = (folder / "plan.json").is_file()
            why = "is not finished: run advdmd encode again" if unfinished else "is not a cache: make one with advdmd encode"
            raise ValueError(f"data.folder={str(folder)!r} {why}") from None
        except ValueError as e:
            raise ValueError(f"{folder}: a damaged manifest, plan or prompt list ({e}): encode again") from None
        if self.manifest.get("format") != FORMAT or len(self.prompts) != self.manifest.get("prompts"):
            raise ValueError(f"{folder}: manifest.json and prompts.jsonl do not belong together: encode again")
        self.latent_shape: tuple[int, ...] = tuple(self.plan["latent_shape"])
        self.shard = lru_cache(maxsize=64)(self._shard)

    def expect(self, teacher: Mapping[str, Any]) -> None:
        """Raises ValueError if another teacher's encoders made this cache."""
        found = self.plan["teacher"]
        if changed := sorted(k for k in {*found, *teacher} if found.get(k) != teacher.get(k)):
            raise ValueError(
                f"{self.folder} was encoded by another teacher ({', '.join(changed)} differ): encode again with this one"
            )

    def _shard(self, k: int) -> tuple[Any, list[int]]:
        path = shard_path(self.folder, k)
        if not whole(self.folder, k):
            raise ValueError(f"{path} is missing or damaged (its sha256 differs from its record): run advdmd encode again")
        try:
            file = safe_open(path, "pt")
            return file, file.get_tensor("counts").tolist()
        except SafetensorError as e:
            raise ValueError(f"{path}: {e}") from None

    @property
    def null(self) -> Cond:
        return Cond(**{k: _wide(v) for k, v in load_file(self.folder / "null.safetensors").items()})

    def cond(self, i: Sequence[int]) -> Cond:
        """Conditions of prompts i, trimmed to the longest where masks say what is a token."""
        rows = []
        for n in i:
            file, _ = self.shard(n // SHARD)
            keys = [k for k in ("embeds", "pooled", "mask") if k in file.keys()]  # noqa: SIM118 - not a dict
            at = n % SHARD
            rows.append(Cond(**{k: _wide(file.get_slice(k)[at : at + 1]) for k in keys}))
        both = Cond.cat(rows)
        if both.mask is None:
            return both
        longest = max(1, int(both.mask.sum(1).max()))
        return Cond(both.embeds[:, :longest], both.pooled, both.mask[:, :longest])

    def images(self, n: int) -> int:
        """How many images prompt n has."""
        return self.shard(n // SHARD)[1][n % SHARD]

    def latent(self, n: int, r: int) -> Tensor:
        """[C, h, w]: image r of prompt n."""
        file, counts = self.shard(n // SHARD)
        at = sum(counts[: n % SHARD]) + r
        return file.get_slice("latents")[at : at + 1][0].float()


def _wide(v: Tensor) -> Tensor:
    return v.float() if v.is_floating_point() else v


def shared(every: Tensor, order: list[int], team: Team) -> tuple[Tensor, list[int]]:
    """Of a step's prompts the one before this process's, and its own; and the numbers of its own."""
    mine = team.share(len(every))
    return torch.cat([every[[mine.start - 1]], every[mine.start : mine.stop]]), order[mine.start : mine.stop]


def make_deal(
    cache: Cache, prompts: int, group: int, seed: int, team: Team = ALONE
) -> Callable[[int], tuple[Batch, list[int]]]:
    """step -> groups of one prompt each with real latents of the same prompt, another image every epoch. Pure in the step.

    Raises ValueError if there are too few prompts, or the cache holds no images.
    """
    n = len(cache.prompts)
    if n < prompts:
        raise ValueError(f"{cache.folder} holds {n} prompts, an iteration takes prompts_per_step={prompts}")
    if bare := cache.manifest["prompts_without_image"]:
        raise ValueError(
            f"{cache.folder}: {bare} of {n} prompts have no image, and the critic needs real ones: encode captioned images, or "
            "let the teacher draw them with --reals teacher"
        )

    def step_of(step: int) -> tuple[Batch, list[int]]:
        i, order = shared(*deal(n, prompts, seed, step), team)
        which = i.tolist()
        member = torch.arange(1, len(i)).repeat_interleave(group)
        cond = cache.cond(which)
        real = [
            cache.latent(p, (g + turn // n) % cache.images(p))
            for p, turn in zip(which[1:], order, strict=True)
            for g in range(group)
        ]
        return Batch(cond[member], torch.stack(real), i[member], cond[member - 1]), [
            k * group + g for k in order for g in range(group)
        ]

    return step_of
