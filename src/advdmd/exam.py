"""Scores on held-out images while training: whether reward and score part, and which average to keep."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from advdmd.evaluation import report
from advdmd.evaluation.diversity import diversity
from advdmd.evaluation.generate import jobs
from advdmd.evaluation.shapes import Shapes
from advdmd.files import file_hash, read_object, read_tensors, write_atomically, write_text
from advdmd.look import painter
from advdmd.models.sampler import Sampling
from advdmd.recipe import Data, Recipe
from advdmd.train.learner import Learner
from advdmd.types import ALONE, Log, Team
from advdmd.world.scene import TASKS

WAY_OUT = "delete best.json: the last average is then exported"


def suites(r: Recipe) -> tuple[Shapes, Shapes]:
    """Short prompts of the train split (most are too few to be kept back) and as many dense ones that neither training nor any
    test has; with noise of their own, so that no image of an exam is one of an evaluation."""
    assert isinstance(r.data, Data)  # Recipe refuses exams on others
    n, dense = r.exam_images, len(TASKS) * r.exam_images
    return (
        Shapes("mini-geneval", images_per_task=n, split="train", world=r.data.world),
        Shapes("mini-dpg", images_per_task=dense, prompts_per_task=dense, split="exam", world=r.data.world),
    )


def sit(r: Recipe, backbone: Any, student: Learner, how: Sampling, folder: Path, step: int, team: Team = ALONE) -> Log:
    """Score the averaged student after `step` iterations; keep it in `folder` as best-STEP.safetensors if none was better. The
    first process does; the others help to average.

    The mark is the mean of both suites' strict scores; diversity is that of the short prompts, which leave more open.
    """
    log: Log = {"exam/forwards": r.forwards_until(step)}
    with student.averaging() as net:
        if team.rank:
            return log
        for suite in suites(r):
            wanted = jobs(suite)
            keys = [("exam", item.id, k) for item, k in wanted]
            images = painter(backbone, net, how)([item.prompt for item, _ in wanted], keys)
            table = report.rows(suite, suite.judge([item for item, _ in wanted], images))
            log[f"exam/{suite.name}"] = report.summarise(table, "strict")["overall"]["mean"]
            if suite.name == "mini-geneval":
                log["exam/diversity"] = diversity(suite, images, [item.id for item, _ in wanted]).get("mean", 0.0)
        log["exam/strict"] = (log["exam/mini-geneval"] + log["exam/mini-dpg"]) / 2
        found = best(folder)
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


def over(r: Recipe, folder: Path) -> bool:
    """Whether `patience` exams in a row were no better than the best one: the run may end early, the best average is kept."""
    found = best(folder)
    return r.patience > 0 and found["last"] - found["step"] >= r.patience * r.exam_every


MARGIN = 0.02  # of a score, about the standard error of an exam


def parted(metrics: Sequence[Mapping[str, float]]) -> int | None:
    """The step at which reward and score parted, if they did: two exams in a row more than MARGIN below the best so far, while
    the critic paid more than it did around that best one. Reward hacking looks like this.

    The critic pays only from the first policy turn on: a best exam from before counts as paid like the first one after."""
    paid: list[float] = []
    exams: list[tuple[int, float, float]] = []  # step, score, mean reward since the exam before
    for m in metrics:
        if "reward/end" in m:
            paid.append(m["reward/end"])
        if "exam/strict" in m:
            exams.append((int(m["step"]) + 1, m["exam/strict"], sum(paid) / len(paid) if paid else float("nan")))
            paid = []
    for i in range(2, len(exams)):
        _, top, then = max(exams[:i], key=lambda e: e[1])
        if math.isnan(then):
            then = next((reward for _, _, reward in exams if not math.isnan(reward)), then)
        if all(score < top - MARGIN and reward > then for _, score, reward in exams[i - 1 : i + 1]):
            return exams[i - 1][0]
    return None


def best(folder: Path) -> dict[str, Any]:
    """Step and score of the best average kept so far, and the step of the last exam; a score below all if none was sat."""
    record = folder / "best.json"
    none: dict[str, Any] = {"step": 0, "strict": -1.0, "last": 0}
    return read_object(record, *none, way_out=WAY_OUT) if record.is_file() else none


def load_best(folder: Path, net: Any) -> int:
    """Put the best average into a network; returns its step (0: no exam was sat, the network is as it was)."""
    found = best(folder)
    if found["step"]:
        file = folder / found.get("file", "best.safetensors")  # as it was called before it had its step's name
        net.load_state_dict(read_tensors(file, way_out=WAY_OUT, sha256=found.get("sha256")))
    return int(found["step"])
