"""Metrics of images that are already generated: scorers per prompt, diversity within prompts, distance to another folder."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advdmd.commands.evaluate import read_manifest, trained_on_metric
from advdmd.data.image_files import fault_of, image_suffixes, is_system_file
from advdmd.evaluation import statistics, tables
from advdmd.evaluation.benchmark import Benchmark, SuiteItem, suite_hash
from advdmd.evaluation.generate import LAYOUTS, image_jobs, image_path
from advdmd.evaluation.judging import read_image
from advdmd.evaluation.metrics import distances
from advdmd.evaluation.metrics.inception import load_inception
from advdmd.files import listed, write_text
from advdmd.models.hub import download
from advdmd.progress import Progress
from advdmd.rewards.base import Scorer
from advdmd.rewards.clip import clip_score
from advdmd.rewards.registry import METRICS as LEARNED
from advdmd.rewards.registry import load_scorer
from advdmd.types import Json

SET_METRICS = (
    "diversity",
    "frechet",
    "kernel",
    "fid",
    "kid",
)  # one figure for all images, in features; the last two Inception's
DISTANCES = {"frechet": distances.frechet, "kernel": distances.kernel, "fid": distances.frechet, "kid": distances.kernel}
METRICS = (*LEARNED, *SET_METRICS)
BATCH = 16


def compute_metric(
    suite: Benchmark,
    folder: Path,
    metric: str,
    weights: Path,
    reference: Path | None = None,
    device: str = "cpu",
    allow_training_reward: bool = False,
) -> Json:
    """One metric over a suite's images in `folder`; writes metric-NAME.json there and returns it.

    Raises ValueError on an unknown metric, missing images, weights that do not fit, or a model trained on this metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r}: one of {', '.join(METRICS)}")
    if (reference is not None) != (metric in DISTANCES):
        raise ValueError(f"--reference goes with {', '.join(DISTANCES)}: a folder of images to compare with; metric={metric}")
    wanted = image_jobs(suite)
    paths = [image_path(folder, item, k) for item, k in wanted]
    if lost := [p for p in paths if not p.exists()]:
        raise ValueError(f"{folder}: {len(lost)} of {len(paths)} images are missing, the first {lost[0]}; {LAYOUTS}")
    taught = trained_on_metric(read_manifest(folder).get("model") or {}, metric, allow_training_reward)
    about = {"suite": suite.name, "suite_hash": suite_hash(suite.items()), "images": len(paths)}
    if metric in LEARNED:
        found = _mean_score(wanted, paths, load_scorer(metric, str(weights), device))
    else:
        found = _set_metric(metric, paths, [item.prompt for item, _ in wanted], weights, reference, device)
    result = {**about, **found, "name": found["name"] + (tables.OWN_REWARD if taught else "")}
    write_text(folder / f"metric-{metric}.json", json.dumps(result, indent=1))
    return result


def _mean_score(jobs: Sequence[tuple[SuiteItem, int]], paths: Sequence[Path], scorer: Scorer) -> Json:
    """A figure per image; its mean over tasks with an interval over prompts."""
    progress, rows = Progress(scorer.name, len(paths)), []
    for i in range(0, len(paths), BATCH):
        part = jobs[i : i + BATCH]
        scores = scorer.score([read_image(p) for p in paths[i : i + BATCH]], [item.prompt for item, _ in part])
        rows += [
            {"task": item.task, "item": item.id, "k": k, "score": round(float(s), 5)}
            for (item, k), s in zip(part, scores, strict=True)
        ]
        progress(min(i + BATCH, len(paths)))
    if not all(np.isfinite(r["score"]) for r in rows):
        raise ValueError(f"{scorer.name} gave a score that is not finite: its weights are broken")
    return {"name": scorer.name, "weights": scorer.fingerprint, **statistics.summarize(rows, "score")["overall"], "rows": rows}


def _set_metric(
    metric: str, paths: Sequence[Path], prompts: Sequence[str], weights: Path, reference: Path | None, device: str
) -> Json:
    network: Any = load_inception(weights, device) if metric in ("fid", "kid") else clip_score(download(weights), device)

    def features(files: Sequence[Path]) -> np.ndarray:
        progress, out = Progress(f"{metric}: features", len(files)), []
        for i in range(0, len(files), BATCH):
            out.append(network.embed([read_image(p) for p in files[i : i + BATCH]]))
            progress(min(i + BATCH, len(files)))
        return torch.cat(out).numpy()

    name = metric if metric in ("fid", "kid") else f"{metric}[{network.name.partition('[')[2]}"
    if reference is None:
        return {"name": name, "weights": network.fingerprint, "mean": distances.within_prompts(features(paths), prompts)}
    found = sorted(p for p in reference.rglob("*") if p.suffix.lower() in image_suffixes())
    theirs = [p for p in found if not is_system_file(p.relative_to(reference))]
    if not theirs:
        raise ValueError(f"{reference} holds no images")
    if len(theirs) < len(found):
        print(f"{reference}: passed over: files of the operating system: {len(found) - len(theirs)}", file=sys.stderr)
    if broken := [f"{p}: {why}" for p in theirs if (why := fault_of(p.read_bytes()))]:
        raise ValueError(f"{len(broken)} images cannot be read: repair or remove them\n{listed(broken)}")
    value = DISTANCES[metric](features(paths), features(theirs))
    return {"name": name, "weights": network.fingerprint, "mean": value, "reference_images": len(theirs)}
