"""The command mini, the main job: distil the shipped teacher, score the student beside it."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from advdmd.commands.evaluate import evaluate
from advdmd.commands.train import train
from advdmd.distillation.build import student_sampling
from advdmd.evaluation import tables
from advdmd.files import write_image, write_text
from advdmd.mini.prompts import SAMPLE_PROMPTS
from advdmd.mini.suites import MiniSuite
from advdmd.models import loading
from advdmd.models.images import image_grid, image_sampler
from advdmd.models.sampler import SamplerConfig
from advdmd.progress import duration
from advdmd.recipes import registry
from advdmd.recipes.recipe import MiniData


def mini(folder: Path, words: Sequence[str] = (), overwrite: bool = False, images: int = 96) -> dict[str, Any]:
    """The main job: distil the shipped mini-sd35 to 4 steps, score it beside its teacher, write table, grid, pipeline."""
    began = time.monotonic()
    name = "mini-sd35-advdmd"
    r = registry.resolve(name, words)[1]
    if not isinstance(r.data, MiniData):
        raise ValueError("advdmd mini draws its own data: leave data.folder out, or use advdmd train")
    suite = MiniSuite("mini-geneval", images_per_task=images, world=r.data.world)
    steps, guided = r.algorithm.steps, loading.default_sampling(loading.pipeline_folder(r.teacher))
    labels = [f"teacher, {guided.steps} steps", f"teacher, {steps} steps", f"AdvDMD, {steps} steps"]
    places = [folder / x.replace(", ", "-").replace(" ", "-") for x in labels]
    if overwrite:
        for place in places:
            if (place / "manifest.json").is_file():
                shutil.rmtree(place)
    # The teacher's many steps are drawn by a second process on another core, while this one trains.
    reference = subprocess.Popen(
        [
            *(sys.executable, "-m", "advdmd", "eval", r.teacher, suite.name, "--out", str(places[0])),
            *("--images", str(images), "--world", suite.world, "--threads", "1"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        student = train(name, r, folder / "run", overwrite)
        reference.wait()  # should it have failed, its images are drawn below, where an error is heard
    finally:
        reference.kill()
    models = [(r.teacher, guided), (r.teacher, replace(guided, steps=steps)), (str(student), student_sampling(r))]
    out = {x: evaluate(m, suite, p, how) for x, p, (m, how) in zip(labels, places, models, strict=True)}
    means = [s["strict"]["overall"]["mean"] for s in out.values()]
    closed = (means[2] - means[1]) / (means[0] - means[1]) if means[0] != means[1] else float("nan")
    _compare(models, folder / "comparison.png")
    took = duration(time.monotonic() - began)
    text = tables.markdown(out)
    text += f"\nShare of the gap between {steps} and {guided.steps} teacher steps closed: {closed:.0%}. Took {took}.\n"
    write_text(folder / "table.md", text)
    write_text(folder / "table.json", json.dumps({"models": out, "gap_closed": closed}, indent=1))
    return {"table": text, "models": out, "gap_closed": closed, "student": student}


def _compare(models: Sequence[tuple[str, SamplerConfig]], path: Path) -> None:
    """The same prompts and noise, one row a model."""
    prompts = [p for p in SAMPLE_PROMPTS for _ in range(2)]
    rows = []
    for m, how in models:
        backbone, _ = loading.load(m)
        rows.append(image_sampler(backbone, backbone.net, how)(prompts, [("compare", k) for k in range(len(prompts))]))
    write_image(path, image_grid(rows))
