"""What a teacher's encoders say of prompts and images, on disk: encoded once, read row by row.

A cache is a folder: plan.json (what is in it, and whose encoders), prompts.jsonl, null.safetensors (the empty prompt), shards
of SHARD prompts with all their images, and manifest.json, written last. Every tensor file has a record of its bytes beside it.
Images of several shapes are several caches in one folder, whose plan names them.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from advdmd.files import file_hash, read_object, write_atomically, write_text
from advdmd.types import Cond

PROMPTS_PER_SHARD = 64  # prompts in a shard
OPEN_SHARDS = 64  # shards kept open
FORMAT = 1
ENCODE_AGAIN = "encode again into another folder"
TEACHER_IMAGES_WARNING = (
    "what the critic takes for real the teacher has drawn (--reals teacher): the student is held to the teacher's own "
    "pictures, so expect it to come close to the teacher, not past it; images of your own lift that"
)


def shard_path(folder: Path, k: int) -> Path:
    return folder / f"shard-{k:06d}.safetensors"


def null_path(folder: Path) -> Path:
    return folder / "null.safetensors"


def create_or_resume(folder: Path, plan: Mapping[str, Any]) -> None:
    """Make `folder` the place of this plan, or go on in it. Raises ValueError that says in what another plan differs."""
    path = folder / "plan.json"
    if path.is_file():
        found = read_object(path, way_out=ENCODE_AGAIN)
        found = {k: plan[k] for k in ("tokens",) if k in plan} | found  # which an early cache does not say
        if found != json.loads(json.dumps(plan)):
            changed = ", ".join(sorted(k for k in {*found, *plan} if found.get(k) != plan.get(k)))
            raise ValueError(f"{folder} is a cache of something else ({changed} differ): choose another --out")
    elif folder.exists() and any(not f.name.startswith(".") for f in folder.iterdir()):
        if path.is_file():  # by now: another process claims it too
            return create_or_resume(folder, plan)
        raise ValueError(f"{folder} is not empty and no cache: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(plan, indent=1))


def verified_record(path: Path) -> dict[str, Any] | None:
    """What is recorded of a tensor file, or None if its bytes are not those that were written."""
    try:
        found = json.loads(path.with_suffix(".json").read_text())
        return found if file_hash(path) == found["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, tensors: Mapping[str, Tensor], **about: Any) -> None:
    write_atomically(path, lambda p: save_file(dict(tensors), p))
    write_text(path.with_suffix(".json"), json.dumps({"sha256": file_hash(path), **about}))


def _columns(cond: Cond) -> dict[str, Tensor]:
    """A condition as tensors to save: floats as bfloat16."""
    found = {"embeds": cond.embeds, "pooled": cond.pooled, "mask": cond.mask}
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in found.items() if v is not None}
    return {k: v.cpu().contiguous() for k, v in half.items()}


def _finite(path: Path, tensors: dict[str, Tensor], of: str, way_out: str = "try --device cpu") -> dict[str, Tensor]:
    if bad := [name for name, v in tensors.items() if not torch.isfinite(v).all()]:
        raise FloatingPointError(f"{path}: {', '.join(bad)} of {of} are not finite; {way_out}")
    return tensors


def write_null(folder: Path, cond: Cond) -> None:
    """The empty prompt's condition [1]. Raises FloatingPointError, and writes nothing, if a number of it is not finite."""
    _write(null_path(folder), _finite(null_path(folder), _columns(cond), "the empty prompt"))


def write_shard(folder: Path, k: int, cond: Cond, latents: Sequence[Tensor], content: str = "") -> None:
    """Conditions of its prompts, and of each prompt its images' latents [n_i, C, h, w]; `content` names their sources.

    Raises FloatingPointError, and writes nothing, if a number is not finite.
    """
    counts = [len(z) for z in latents]
    both = torch.cat(list(latents)).bfloat16().cpu().contiguous()
    tensors = _columns(cond) | {"counts": torch.tensor(counts), "latents": both}
    path = shard_path(folder, k)
    _write(path, _finite(path, tensors, "these prompts"), images=counts, content=content)


def finalize(folder: Path, prompts: Sequence[str]) -> bool:
    """Write the manifest if every shard is there; says whether it is finished."""
    records = [shard_path(folder, k).with_suffix(".json") for k in range(-(-len(prompts) // PROMPTS_PER_SHARD))]
    if not all(r.is_file() for r in (*records, null_path(folder).with_suffix(".json"))):
        return False
    write_text(folder / "prompts.jsonl", "".join(json.dumps(p) + "\n" for p in prompts))
    images = [n for r in records for n in read_object(r, "images", way_out=ENCODE_AGAIN)["images"]]
    told = {"format": FORMAT, "prompts": len(prompts), "images": sum(images), "prompts_without_image": images.count(0)}
    write_text(folder / "manifest.json", json.dumps(told, indent=1))
    return True


def bucket_names(folder: Path) -> list[str]:
    """The caches that a folder's plan says it holds, one for each size of images; none if it is a cache itself."""
    plan = folder / "plan.json"
    named = read_object(plan, way_out=ENCODE_AGAIN).get("sizes") if plan.is_file() else None
    if named is not None and not (isinstance(named, list) and named):
        raise ValueError(f"{plan} is damaged (sizes: {named!r}): run advdmd encode again")
    return [str(k) for k in named or ()]


class EmbeddingCache:
    """A finished cache, read lazily: a shard's bytes are checked when it is first touched."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "manifest.json").is_file():
            unfinished = (folder / "plan.json").is_file()
            why = "is not finished: run advdmd encode again" if unfinished else "is not a cache: make one with advdmd encode"
            raise ValueError(f"data.folder={str(folder)!r} {why}")
        self.manifest, self.plan = (read_object(folder / f, way_out=ENCODE_AGAIN) for f in ("manifest.json", "plan.json"))
        try:
            self.prompts: list[str] = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
            self.resolution, self.teacher = int(self.plan["resolution"]), dict(self.plan["teacher"])
            whole = (self.manifest["format"], self.manifest["prompts"]) == (FORMAT, len(self.prompts))
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{folder}: a damaged plan, manifest or prompt list ({e!r}): encode again") from None
        if not whole:
            raise ValueError(f"{folder}: manifest.json and prompts.jsonl do not belong together: encode again")
        self._checked: set[Path] = set()
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def expect(self, teacher: Mapping[str, Any]) -> None:
        """Raises ValueError if another teacher's encoders made this cache."""
        if changed := sorted(k for k in {*self.teacher, *teacher} if self.teacher.get(k) != teacher.get(k)):
            raise ValueError(
                f"{self.folder} was encoded by another teacher ({', '.join(changed)} differ): encode again with this one"
            )

    def with_images(self) -> None:
        """Raises ValueError if a prompt has no image."""
        if bare := self.manifest["prompts_without_image"]:
            raise ValueError(
                f"{self.folder}: {bare} of {len(self.prompts)} prompts have no image, and the critic needs real ones: encode "
                "captioned images, or let the teacher draw them with --reals teacher"
            )

    def _check(self, path: Path) -> None:
        """Once a file: its bytes are those that were written."""
        if path not in self._checked and verified_record(path) is None:
            raise ValueError(f"{path} is missing or damaged (its sha256 differs from its record): run advdmd encode again")
        self._checked.add(path)

    def _open(self, k: int) -> tuple[Any, list[int]]:
        path = shard_path(self.folder, k)
        self._check(path)
        n = min(PROMPTS_PER_SHARD, len(self.prompts) - k * PROMPTS_PER_SHARD)
        try:
            file = safe_open(path, "pt")
            _fits({name: file.get_slice(name) for name in file.keys()}, n)  # noqa: SIM118 - not a dict
            counts = file.get_tensor("counts").tolist()
            if min(counts) < 0 or sum(counts) != file.get_slice("latents").get_shape()[0]:
                raise ValueError(f"{sum(counts)} images are counted, others are there")
            return file, counts
        except (SafetensorError, ValueError) as e:
            raise ValueError(f"{path} is no shard of {n} prompts ({e}): {ENCODE_AGAIN}") from None

    @property
    def null(self) -> Cond:
        """[1] of the empty prompt."""
        path = null_path(self.folder)
        self._check(path)
        try:
            file = safe_open(path, "pt")
            _fits({name: file.get_slice(name) for name in file.keys()}, 1, whole=False)  # noqa: SIM118 - not a dict
            return Cond(**{k: _wide(v) for k, v in _finite(path, load_file(path), "the empty prompt", ENCODE_AGAIN).items()})
        except (SafetensorError, ValueError) as e:
            raise ValueError(f"{path} is no condition ({e}): {ENCODE_AGAIN}") from None

    def cond(self, i: Sequence[int]) -> Cond:
        """Conditions of prompts i, trimmed to the longest where masks say what is a token."""
        rows = []
        for n in i:
            file, _ = self._shard(n // PROMPTS_PER_SHARD)
            keys = [k for k in ("embeds", "pooled", "mask") if k in file.keys()]  # noqa: SIM118 - not a dict
            at = n % PROMPTS_PER_SHARD
            rows.append(Cond(**{k: self._finite(_wide(file.get_slice(k)[at : at + 1]), n) for k in keys}))
        both = Cond.cat(rows)
        if both.mask is None:
            return both
        longest = max(1, int(both.mask.sum(1).max()))
        return Cond(both.embeds[:, :longest], both.pooled, both.mask[:, :longest])

    def images(self, n: int) -> int:
        """How many images prompt n has."""
        return self._shard(n // PROMPTS_PER_SHARD)[1][n % PROMPTS_PER_SHARD]

    def real(self, n: int, k: int) -> Tensor:
        """[C, h, w]: the k-th image of prompt n, counted round."""
        file, counts = self._shard(n // PROMPTS_PER_SHARD)
        at = sum(counts[: n % PROMPTS_PER_SHARD]) + k % counts[n % PROMPTS_PER_SHARD]
        return self._finite(file.get_slice("latents")[at : at + 1][0].float(), n)

    def _finite(self, v: Tensor, n: int) -> Tensor:
        if not torch.isfinite(v).all():
            path = shard_path(self.folder, n // PROMPTS_PER_SHARD)
            raise FloatingPointError(
                f"{path}: what is kept of prompt {n % PROMPTS_PER_SHARD} ({self.prompts[n][:60]!r}) is not finite"
            )
        return v


# Of a shard of n prompts: how many dimensions each tensor has, and what its type begins with.
LAYOUT = {"embeds": (3, "BF"), "pooled": (2, "BF"), "mask": (2, "I64"), "counts": (1, "I64"), "latents": (4, "BF")}


def _fits(found: Mapping[str, Any], n: int, whole: bool = True) -> None:
    """Raises ValueError unless tensors are what `write_shard` writes of n prompts, or without images `write_null`."""
    needed = {"embeds", "counts", "latents"} if whole else {"embeds"}
    if wrong := sorted((needed - found.keys()) | (found.keys() - LAYOUT.keys())):
        raise ValueError(f"{wrong[0]} is missing or strange")
    for name, v in found.items():
        dims, kind = LAYOUT[name]
        if len(v.get_shape()) != dims or not v.get_dtype().startswith(kind) or (name != "latents" and v.get_shape()[0] != n):
            raise ValueError(f"{name} is {v.get_dtype()} {list(v.get_shape())}")


def _wide(v: Tensor) -> Tensor:
    return v.float() if v.is_floating_point() else v
