"""Prompts x seeds to PNG files and a manifest. Images that are there already are not generated again."""

import json
from collections.abc import Mapping
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image

from advdmd.evaluation.benchmark import Benchmark, SuiteItem
from advdmd.files import read_object, write_image, write_text
from advdmd.models.images import ImageSampler

Worker = tuple[int, int]  # (i, n): process i of n
GENERATE_AGAIN = "delete the folder's manifest.json and images, and generate them again"


def image_path(folder: Path, item: SuiteItem, k: int) -> Path:
    """Where image k of an item is: this package's layout, or GenEval's (ITEM/samples/0000K.png) where a folder has that."""
    theirs = folder / item.id / "samples"
    return theirs / f"{k:05d}.png" if theirs.is_dir() else folder / "images" / item.id / f"{k}.png"


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
        raise ValueError(f"{folder}: only {done}/{len(jobs)} images are there (first missing: {missing[0]}); run it again")
    return np.stack([np.asarray(Image.open(image_path(folder, item, k)).convert("RGB")) for item, k in jobs])
