"""From images on disk to verdicts: each image is judged once, judgements are kept, verdicts are computed from them.

perceptions-IofN.jsonl is append-only, one line per image, keyed by item, hash of the image and judge: a killed run goes on,
workers are joined by reading all files, another judge adds lines of its own.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from advdmd.data.image_files import decode
from advdmd.evaluation.benchmark import Benchmark, ExcludedItem, Judge, SuiteItem
from advdmd.evaluation.generate import Worker, image_jobs, image_path
from advdmd.files import file_hash, name_file_in_errors, object_hash, read_lines
from advdmd.types import Json

Key = tuple[str, int, str]  # item, k, hash of the image file


class JudgedImages(NamedTuple):
    """A row for each image that has a verdict; how many have none, and why."""

    rows: list[Json]
    missing: list[Path]  # not generated, or not judged
    errors: list[str]  # the judge failed on them
    excluded: int  # left out by the suite's own arithmetic


def read_image(path: Path) -> np.ndarray:
    """[H, W, 3] uint8, upright, in sRGB. Raises ValueError if it is no image."""
    try:
        return np.asarray(decode(path.read_bytes()))
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} cannot be read as an image ({e}): delete it and generate it again") from None


def _lines(folder: Path) -> Iterator[Json]:
    """All whole lines; a last one that a kill cut short has no end and is left out."""
    hint = "delete the line, its image is judged again"
    for path in sorted(folder.glob("perceptions-*.jsonl")):
        for n, found in enumerate(read_lines(path, "item", "k", "image", "judge", hint=hint), 1):
            if found.pop("sum", None) not in (None, object_hash(found)):
                raise ValueError(f"{path}, line {n} is damaged (its content has another hash): {hint}")
            yield found


def _known(folder: Path, judge: Judge) -> dict[Key, Json]:
    """The judgement, or the error, by image: later lines win."""
    return {(r["item"], r["k"], r["image"]): r for r in _lines(folder) if r["judge"] == judge.fingerprint}


def _append_to(path: Path) -> BinaryIO:
    """Open for appending, after whatever a kill left after the last whole line is cut off."""
    if path.exists():
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            os.truncate(path, text.rfind(b"\n") + 1)
    return open(path, "ab")


def run_judge(
    suite: Benchmark,
    folder: Path,
    judge: Judge,
    worker: Worker = (0, 1),
    tolerant: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Have the judge judge every image of a worker's part that it has not judged yet.

    An error of the judge is written down and raised as ValueError, unless `tolerant`; the next run tries again. progress is
    called with the number of images that are done.
    """
    known = {k for k, r in _known(folder, judge).items() if "error" not in r}
    jobs = [(item, k, image_path(folder, item, k)) for item, k in image_jobs(suite, worker)]
    hashed = [(item, k, path, file_hash(path)) for item, k, path in jobs if path.exists()]
    todo = [x for x in hashed if (x[0].id, x[1], x[3]) not in known]
    if not todo:
        return
    judge.self_test()
    record = folder / f"perceptions-{worker[0]}of{worker[1]}.jsonl"
    with _append_to(record) as file:
        for i in range(0, len(todo), judge.batch):
            part = todo[i : i + judge.batch]
            results, error = _judge(judge, [x[0] for x in part], [x[2] for x in part])
            with name_file_in_errors(record):
                for (item, k, _, image), result in zip(part, results, strict=True):
                    line = {"item": item.id, "k": k, "image": image, "judge": judge.fingerprint, **result}
                    file.write(json.dumps(line | {"sum": object_hash(line)}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            if error and not tolerant:
                path = next(p for (_, _, p, _), r in zip(part, results, strict=True) if "error" in r)
                raise ValueError(f"{path}: {judge.name}: {error}; what was judged before is kept")
            if progress:
                progress(min(i + judge.batch, len(todo)))


def _judge(judge: Judge, items: Sequence[SuiteItem], paths: Sequence[Path]) -> tuple[list[Json], str]:
    """One record per image, {"seen".

    ...} or {"error": ...}, and the first error; images of a batch that fails are judged one by one.
    """
    try:
        return [{"seen": s} for s in judge.judge(items, [read_image(p) for p in paths])], ""
    except (ValueError, RuntimeError, OSError) as e:  # a judge's failure is a result, not a crash
        if len(items) == 1:
            error = f"{type(e).__name__}: {e}"
            return [{"error": error}], error
    single = [_judge(judge, [item], [path]) for item, path in zip(items, paths, strict=True)]
    return [records[0] for records, _ in single], next((error for _, error in single if error), "")


def compute_verdicts(suite: Benchmark, folder: Path, judge: Judge, seed: int) -> JudgedImages:
    """Verdicts on everything that the judge has judged, of all workers. No model runs. seed: of the images, for the rows."""
    known, rows, errors, missing, excluded = _known(folder, judge), list[Json](), list[str](), list[Path](), set[str]()
    for item, k in image_jobs(suite):
        path = image_path(folder, item, k)
        image = file_hash(path) if path.exists() else ""
        found = known.get((item.id, k, image))
        if found is None:
            missing.append(path)
        elif "error" in found:
            errors.append(f"{item.id}/{k}: {found['error']}")
        else:
            try:
                verdict = suite.verdict(item, found["seen"])
            except ExcludedItem:
                excluded.add(item.id)  # with all of its images
                continue
            about = {"item": item.id, "k": k, "task": item.task, "prompt": item.prompt, "seed": seed}
            by = {"image": image, "judge": judge.name, "judge_hash": judge.fingerprint}
            rows.append(about | by | verdict.to_json())
    kept = [r for r in rows if r["item"] not in excluded]
    return JudgedImages(kept, missing, errors, sum(item.id in excluded for item, _ in image_jobs(suite)))
