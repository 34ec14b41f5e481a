"""From images on disk to verdicts: each image is looked at once, what was seen is kept, verdicts are worked out from that.

perceptions-IofN.jsonl is append-only, a line an image, keyed by item, image hash and judge: a killed run goes on, shards are
joined by reading them all, another judge adds lines of its own.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from advdmd.evaluation.benchmark import Benchmark, ExcludedItem, Judge, Judgement, SuiteItem
from advdmd.evaluation.generate import Worker, image_jobs, image_path
from advdmd.files import file_hash, name_file_in_errors, object_hash, read_lines

Key = tuple[str, int, str]  # item, k, hash of the image file


class JudgedImages(NamedTuple):
    """A row per image that has a verdict; how many have none, and why."""

    rows: list[dict[str, Any]]
    missing: int  # not drawn, or not looked at
    errors: list[str]  # the judge failed on them
    dropped: int  # left out by the suite's own arithmetic


def read_image(path: Path) -> np.ndarray:
    """[H, W, 3] uint8, upright. Raises ValueError if it is no image."""
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path} cannot be read as an image ({e}): delete it and draw it again") from None


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    """All whole lines; a last one that a kill cut short has no end and is passed over."""
    way_out = "delete the line, its image is looked at again"
    for path in sorted(folder.glob("perceptions-*.jsonl")):
        for n, found in enumerate(read_lines(path, "item", "k", "image", "judge", way_out=way_out), 1):
            if found.pop("sum", None) not in (None, object_hash(found)):
                raise ValueError(f"{path}, line {n} is damaged (what it says has another hash): {way_out}")
            yield found


def _known(folder: Path, judge: Judge) -> dict[Key, dict[str, Any]]:
    """What was seen, or the error, by image: later lines win."""
    return {(r["item"], r["k"], r["image"]): r for r in _lines(folder) if r["judge"] == judge.fingerprint}


def _append_to(path: Path) -> BinaryIO:
    """Open for appending, after whatever a kill left behind the last whole line is cut off."""
    if path.exists():
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            os.truncate(path, text.rfind(b"\n") + 1)
    return open(path, "ab")


def run_judge(
    suite: Benchmark,
    folder: Path,
    judge: Judge,
    shard: Worker = (0, 1),
    tolerant: bool = False,
    say: Callable[[int], object] | None = None,
) -> None:
    """Show the judge every image of the shard that it has not seen.

    What it raises is written down and ends the run (as ValueError), unless `tolerant`; the next run tries again.
    """
    known = {k for k, r in _known(folder, judge).items() if "error" not in r}
    wanted = [(item, k, image_path(folder, item, k)) for item, k in image_jobs(suite, shard)]
    hashed = [(item, k, path, file_hash(path)) for item, k, path in wanted if path.exists()]
    todo = [x for x in hashed if (x[0].id, x[1], x[3]) not in known]
    if not todo:
        return
    judge.self_test()
    path_of_lines = folder / f"perceptions-{shard[0]}of{shard[1]}.jsonl"
    with _append_to(path_of_lines) as file:
        for i in range(0, len(todo), judge.batch):
            part = todo[i : i + judge.batch]
            seen, error = _judge(judge, [x[0] for x in part], [x[2] for x in part])
            with name_file_in_errors(path_of_lines):
                for (item, k, _, image), found in zip(part, seen, strict=True):
                    line = {"item": item.id, "k": k, "image": image, "judge": judge.fingerprint, **found}
                    file.write(json.dumps(line | {"sum": object_hash(line)}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            if error and not tolerant:
                path = next(p for (_, _, p, _), s in zip(part, seen, strict=True) if "error" in s)
                raise ValueError(f"{path}: {judge.name}: {error}; what was seen before is kept")
            if say:
                say(min(i + judge.batch, len(todo)))


def _judge(judge: Judge, items: Sequence[SuiteItem], paths: Sequence[Path]) -> tuple[list[dict[str, Any]], str]:
    """One record per image, {"seen": ...} or {"error": ...}, and the first error; what fails in a batch is looked at alone."""
    try:
        return [{"seen": s} for s in judge.look(items, [read_image(p) for p in paths])], ""
    except (ValueError, RuntimeError, OSError) as e:  # a judge's failure is a finding, not a crash
        if len(items) == 1:
            error = f"{type(e).__name__}: {e}"
            return [{"error": error}], error
    alone = [_judge(judge, [item], [path]) for item, path in zip(items, paths, strict=True)]
    return [records[0] for records, _ in alone], next((error for _, error in alone if error), "")


def compute_verdicts(suite: Benchmark, folder: Path, judge: Judge, seed: int) -> JudgedImages:
    """Verdicts on everything the judge has seen, of all shards. No model runs."""
    known, rows, errors, missing, dropped = _known(folder, judge), [], [], 0, 0
    for item, k in image_jobs(suite):
        path = image_path(folder, item, k)
        image = file_hash(path) if path.exists() else ""
        found = known.get((item.id, k, image))
        if found is None:
            missing += 1
        elif "error" in found:
            errors.append(f"{item.id}/{k}: {found['error']}")
        else:
            seen: Judgement = found["seen"]
            try:
                verdict = suite.verdict(item, seen)
            except ExcludedItem:
                dropped += 1
                continue
            about = {"item": item.id, "k": k, "task": item.task, "prompt": item.prompt, "seed": seed}
            by = {"image": image, "judge": judge.name, "judge_hash": judge.fingerprint}
            rows.append(about | by | asdict(verdict))
    return JudgedImages(rows, missing, errors, dropped)
