"""Scores on held-out images while training: whether reward and score part, and which average to keep."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from advdmd.evaluation import report
from advdmd.evaluation.diversity import diversity
from advdmd.evaluation.generate import jobs
from advdmd.evaluation.shapes import Shapes
from advdmd.look import painter
from advdmd.models.sampler import Sampling
from advdmd.recipe import Recipe
from advdmd.train.checkpoint import write_atomically, write_text
from advdmd.train.learner import Learner
from advdmd.types import Log

# On its train split, with noise of its own: no image of any evaluation, and of the tasks that keep prompts back none of those.
SUITE = "mini-geneval"


def sit(r: Recipe, backbone: Any, student: Learner, how: Sampling, folder: Path, step: int) -> Log:
    """Score the averaged student after `step` iterations; keep it in `folder` as best.safetensors if none was better."""
    suite = Shapes(SUITE, images_per_task=r.exam_images, split="train", world=r.data.world)
    wanted = jobs(suite)
    keys = [("exam", item.id, k) for item, k in wanted]
    with student.averaging() as net:
        images = painter(backbone, net, how)([item.prompt for item, _ in wanted], keys)
        table = report.rows(suite, suite.judge([item for item, _ in wanted], images))
        strict, loose = (report.summarise(table, rule)["overall"]["mean"] for rule in ("strict", "loose"))
        if strict > best(folder)["strict"]:
            weights = {k: v.contiguous() for k, v in net.state_dict().items()}
            write_atomically(folder / "best.safetensors", lambda p: save_file(weights, p))
            write_text(folder / "best.json", json.dumps({"step": step, "strict": strict}))
    spread = diversity(suite, images, [item.id for item, _ in wanted]).get("mean", 0.0)
    return {"exam/strict": strict, "exam/loose": loose, "exam/diversity": spread, "exam/forwards": r.forwards_until(step)}


def best(folder: Path) -> dict[str, float]:
    """Step and score of the best average kept so far; a score below any other if there is none."""
    record = folder / "best.json"
    return json.loads(record.read_text()) if record.is_file() else {"step": 0, "strict": -1.0}


def load_best(folder: Path, net: Any) -> int:
    """Put the best average into a network; returns its step (0: no exam was sat, the network is as it was)."""
    step = int(best(folder)["step"])
    if step:
        net.load_state_dict(load_file(folder / "best.safetensors"))
    return step
