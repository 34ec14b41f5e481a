"""The command mini, the main job: distil a shipped teacher, score the student beside it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from advdmd.commands.evaluate import evaluate
from advdmd.commands.train import train
from advdmd.evaluation import tables
from advdmd.files import write_image, write_text
from advdmd.mini.prompts import SAMPLE_PROMPTS
from advdmd.mini.suites import MiniSuite
from advdmd.mini.training_data import MiniData
from advdmd.models import devices, loading
from advdmd.models.images import image_grid, image_sampler
from advdmd.models.sampler import SamplerConfig
from advdmd.progress import duration
from advdmd.recipes import registry
from advdmd.recipes.recipe import Recipe
from advdmd.training import distributed
from advdmd.types import Json

RECIPE = "mini-sd35-advdmd"
ADVDMD = (sys.executable, "-m", "advdmd")
PROCESSES = 2  # of which two cores make 1.3 times the iterations of one (docs/log.md); more were not measured


def mini(folder: Path, words: Sequence[str] = (), overwrite: bool = False, images: int = 96) -> Json:
    """Distil the shipped mini-sd35 to 4 steps and score it beside its teacher, `images` per task.

    words: overrides of the recipe.

    Writes table.md, table.json, comparison.png and the run into `folder`; returns table, summaries, the share of the gap that
    is closed, and the student's folder. Raises ValueError on overrides that do not fit.
    """
    began = time.monotonic()
    r = registry.resolve(RECIPE, words)[1]
    if not isinstance(r.data, MiniData):
        raise ValueError("advdmd mini draws its own data: leave data.folder out, or use advdmd train")
    suite = MiniSuite("mini-geneval", images_per_task=images, world=r.data.world)
    student_sampler, guided = r.algorithm.sampler(), loading.default_sampling(loading.pipeline_folder(r.teacher))
    steps = student_sampler.steps
    labels = [f"teacher, {guided.steps} steps", f"teacher, {steps} steps", f"AdvDMD, {steps} steps"]
    places = [folder / x.replace(", ", "-").replace(" ", "-") for x in labels]
    if overwrite:
        for place in places:
            if (place / "manifest.json").is_file():
                shutil.rmtree(place)
    # The teacher's many steps are sampled by a process of their own, in the moments when those that train wait for each other.
    reference = subprocess.Popen(
        [
            *(*ADVDMD, "eval", r.teacher, suite.name, "--out", str(places[0])),
            *("--images", str(images), "--world", suite.world, "--threads", "1"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with distributed.local_processes(_processes(r), [*ADVDMD, "train", RECIPE, "--out", str(folder / "run"), *words]):
            student = train(RECIPE, r, folder / "run", overwrite)
        reference.wait()  # if it has failed, its images are sampled below, where an error is reported
    finally:
        reference.kill()
    models = [(r.teacher, guided), (r.teacher, replace(guided, steps=steps)), (str(student), student_sampler)]
    out = {x: evaluate(m, suite, p, s) for x, p, (m, s) in zip(labels, places, models, strict=True)}
    means = [s["strict"]["overall"]["mean"] for s in out.values()]
    closed = (means[2] - means[1]) / (means[0] - means[1]) if means[0] != means[1] else float("nan")
    _write_comparison(models, folder / "comparison.png")
    took = duration(time.monotonic() - began)
    text = tables.markdown(out)
    text += f"\nShare of the gap between {steps} and {guided.steps} teacher steps closed: {closed:.0%}. Took {took}.\n"
    write_text(folder / "table.md", text)
    write_text(folder / "table.json", json.dumps({"models": out, "gap_closed": closed}, indent=1))
    return {"table": text, "models": out, "gap_closed": closed, "student": student}


def _processes(r: Recipe) -> int:
    """How many processes train: PROCESSES on a CPU with so many cores, if they can share a recipe's batch.

    One where torchrun has started several already.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if devices.resolve_device(r.device) != "cpu" or os.name != "posix" or cores < PROCESSES:
        return 1
    if distributed.rank_and_world_size()[1] > 1:
        return 1
    try:
        r.check_world_size(PROCESSES)
    except ValueError:
        return 1
    return PROCESSES


def _write_comparison(models: Sequence[tuple[str, SamplerConfig]], path: Path) -> None:
    """The same prompts and noise, one row per model."""
    prompts = [p for p in SAMPLE_PROMPTS for _ in range(2)]
    rows = []
    for model, sampler in models:
        backbone, _ = loading.load(model)
        generate = image_sampler(backbone, backbone.net, sampler)
        rows.append(generate(prompts, [("compare", k) for k in range(len(prompts))]))
    write_image(path, image_grid(rows))
