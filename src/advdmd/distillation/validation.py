"""Scores on held-out images while training: whether reward and score part, and which average to keep."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from advdmd.evaluation import results, statistics
from advdmd.evaluation.generate import image_jobs
from advdmd.files import file_hash, read_object, read_tensors, write_atomically, write_text
from advdmd.mini.diversity import diversity
from advdmd.mini.suites import MiniSuite
from advdmd.mini.world.scene import TASKS
from advdmd.models.images import image_sampler
from advdmd.models.sampler import SamplerConfig
from advdmd.recipes.recipe import MiniData, Recipe
from advdmd.training.learner import Learner
from advdmd.types import ONE_RANK, Metrics, Ranks

HINT = "delete best.json: the last average is then exported"


def validation_suites(r: Recipe) -> tuple[MiniSuite, MiniSuite]:
    """Short prompts of the train split (most are too few to be kept back) and as many dense ones that neither training nor any
    test has; with noise of their own, so that no image of an exam is one of an evaluation."""
    assert isinstance(r.data, MiniData)  # Recipe refuses exams on others
    n, dense = r.exam_images, len(TASKS) * r.exam_images
    return (
        MiniSuite("mini-geneval", images_per_task=n, split="train", world=r.data.world),
        MiniSuite("mini-dpg", images_per_task=dense, prompts_per_task=dense, split="exam", world=r.data.world),
    )


def validate(
    r: Recipe, backbone: Any, student: Learner, how: SamplerConfig, folder: Path, step: int, team: Ranks = ONE_RANK
) -> Metrics:
    """Score the averaged student after `step` iterations; keep it in `folder` as best-STEP.safetensors if none was better. The
    first process does; the others help to average.

    The mark is the mean of both suites' strict scores; diversity is that of the short prompts, which leave more open.
    """
    log: Metrics = {"exam/forwards": r.forwards_until(step)}
    with student.averaging() as net:
        if team.rank:
            return log
        for suite in validation_suites(r):
            wanted = image_jobs(suite)
            keys = [("exam", item.id, k) for item, k in wanted]
            images = image_sampler(backbone, net, how)([item.prompt for item, _ in wanted], keys)
            table = results.verdict_rows(suite, suite.judge([item for item, _ in wanted], images))
            log[f"exam/{suite.name}"] = statistics.summarize(table, "strict")["overall"]["mean"]
            if suite.name == "mini-geneval":
                log["exam/diversity"] = diversity(suite, images, [item.id for item, _ in wanted]).get("mean", 0.0)
        log["exam/strict"] = (log["exam/mini-geneval"] + log["exam/mini-dpg"]) / 2
        found = read_best(folder)
        if log["exam/strict"] > found["strict"]:
            weights = {k: v.contiguous() for k, v in net.state_dict().items()}
            kept = folder / f"best-{step:07d}.safetensors"
            write_atomically(kept, lambda p: save_file(weights, p))
            found = {"step": step, "strict": log["exam/strict"], "file": kept.name, "sha256": file_hash(kept)}
        write_text(folder / "best.json", json.dumps(found | {"last": step}))
        for older in folder.glob("best*.safetensors"):
            if older.name != found.get("file", "best.safetensors"):
                older.unlink()
    return log


def should_stop_early(r: Recipe, folder: Path) -> bool:
    """Whether `patience` exams in a row were no better than the best one: the run may end early, the best average is kept."""
    found = read_best(folder)
    return r.patience > 0 and found["last"] - found["step"] >= r.patience * r.exam_every


def read_best(folder: Path) -> dict[str, Any]:
    """Step and score of the best average kept so far, and the step of the last exam; a score below all if none was sat."""
    record = folder / "best.json"
    none: dict[str, Any] = {"step": 0, "strict": -1.0, "last": 0}
    return read_object(record, *none, way_out=HINT) if record.is_file() else none


def load_best(folder: Path, net: Any) -> int:
    """Put the best average into a network; returns its step (0: no exam was sat, the network is as it was)."""
    found = read_best(folder)
    if found["step"]:
        file = folder / found.get("file", "best.safetensors")  # as it was called before it had its step's name
        net.load_state_dict(read_tensors(file, way_out=HINT, sha256=found.get("sha256")))
    return int(found["step"])
