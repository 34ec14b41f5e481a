"""Prompts x seeds to PNG files and a manifest. Images that are there already are not generated again."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image

from advdmd.data.image_files import image_suffixes
from advdmd.evaluation.benchmark import Benchmark, SuiteItem
from advdmd.files import read_object, write_image, write_text
from advdmd.models.images import ImageSampler

Worker = tuple[int, int]  # (i, n): process i of n
LAYOUTS = (
    "images are looked for as images/ITEM/K.png, as ITEM/samples/* (GenEval), as ITEM/* and as ITEM.png or ITEM_K.png, in any "
    "format; with fewer images of a prompt give --images N"
)
GENERATE_AGAIN = "delete the folder's manifest.json and images, and generate them again"


def image_path(folder: Path, item: SuiteItem, k: int) -> Path:
    """Where image k of an item is, or would be: in this package's layout, or in one of LAYOUTS where a folder has that."""
    ours, theirs = folder / "images" / item.id, folder / item.id
    if ours.is_dir():
        return ours / f"{k}.png"
    for place in (theirs / "samples", theirs):  # GenEval's, whose images have any names in their order
        if place.is_dir() and (found := _images_in(place)):
            return found[k] if k < len(found) else place / f"{k:05d}.png"
    names = [item.id] * (k == 0) + [f"{item.id}{dash}{number}" for dash in "_-" for number in (str(k), f"{k:05d}")]
    return next((f for n in names for f in _flat(folder).get(n, ())), ours / f"{k}.png")


def _images_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in image_suffixes() and not f.name.startswith("."))


@lru_cache(maxsize=8)
def _flat(folder: Path) -> dict[str, list[Path]]:
    """Images directly in a folder, by their names without the suffix."""
    found: dict[str, list[Path]] = {}
    for f in _images_in(folder) if folder.is_dir() else ():
        found.setdefault(f.stem, []).append(f)
    return found


def image_jobs(benchmark: Benchmark, worker: Worker = (0, 1)) -> list[tuple[SuiteItem, int]]:
    """Every (item, image index) of a suite, in order; for worker (i, n) those whose item falls to process i of n."""
    items = [i for i in benchmark.items() if crc32(i.id.encode()) % worker[1] == worker[0]]
    return [(item, k) for item in items for k in range(item.n_images)]


def generate(
    benchmark: Benchmark,
    sampler: ImageSampler,
    folder: Path,
    seed: int,
    about: Mapping[str, object],
    batch: int = 512,
    worker: Worker = (0, 1),
) -> None:
    """Generate the missing images of a worker's part of a suite into `folder`.

    An image's noise is keyed by suite, item, index and seed.

    about: what else the manifest records. Raises ValueError if the folder holds images of another model, sampler, suite or
    seed.
    """
    manifest = folder / "manifest.json"
    record = {"suite": benchmark.name, "seed": seed, **about}
    if manifest.exists() and (found := read_object(manifest, hint=GENERATE_AGAIN)) != record:
        changed = sorted(k for k in {*found, *record} if found.get(k) != record.get(k))
        raise ValueError(f"{folder} holds images of another run ({', '.join(changed)} differ): choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(manifest, json.dumps(record, indent=1))
    missing = [(item, k) for item, k in image_jobs(benchmark, worker) if not image_path(folder, item, k).exists()]
    for i in range(0, len(missing), batch):
        part = missing[i : i + batch]
        images = sampler([item.prompt for item, _ in part], [(benchmark.name, item.id, k, seed) for item, k in part])
        for (item, k), image in zip(part, images, strict=True):
            path = image_path(folder, item, k)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(path, Image.fromarray(image))


def read_images(benchmark: Benchmark, folder: Path) -> np.ndarray:
    """All images of a suite [N, H, W, 3] uint8. Raises ValueError if any is missing: a partial run has no score."""
    jobs = image_jobs(benchmark)
    missing = [str(image_path(folder, item, k)) for item, k in jobs if not image_path(folder, item, k).exists()]
    if missing:
        done = len(jobs) - len(missing)
        raise ValueError(
            f"{folder}: only {done}/{len(jobs)} images are there (first missing: {missing[0]}); run it again, or {LAYOUTS}"
        )
    return np.stack([np.asarray(Image.open(image_path(folder, item, k)).convert("RGB")) for item, k in jobs])
