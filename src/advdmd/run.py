"""The verbs of the product as functions: train, paint, evaluate, export, and the main job of the miniature."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from advdmd import exam, health
from advdmd.algorithms.base import Cast
from advdmd.algorithms.twinflow import Twin, TwinFlow
from advdmd.data.buckets import Caches
from advdmd.data.cache import DRAWN_BY_TEACHER
from advdmd.data.deal import Deal, at_home
from advdmd.evaluate import evaluate
from advdmd.evaluation import report
from advdmd.evaluation.metrics.named import parse_reward
from advdmd.evaluation.shapes import Shapes
from advdmd.export import export_student
from advdmd.files import write_image, write_text
from advdmd.look import LOOK_PROMPTS, grid_image, painter, watch
from advdmd.models import load
from advdmd.models.quantize import library, quantize
from advdmd.models.sampler import Sampling
from advdmd.players import extra, make_players, student_sampling
from advdmd.recipe import Data, Recipe, differences, dump
from advdmd.recipes import find
from advdmd.supply import Supply, open_cache, supply
from advdmd.train import checkpoint, loop, parallel
from advdmd.train.book import duration
from advdmd.train.learner import Learner
from advdmd.train.meter import Meter
from advdmd.train.track import check as check_trackers
from advdmd.types import ALONE, Team
from advdmd.world.caption import check_prompt

# What a run writes, and --overwrite may lose.
OURS = (
    ".*",
    "recipe.yaml",
    "metrics.jsonl",
    "checkpoints",
    "samples",
    "student",
    "best.json",
    "best*.safetensors",
    "tensorboard",
    "wandb",
)


def _claim(folder: Path, text: str, overwrite: bool = False, change: Callable[[], str] = lambda: "another recipe") -> None:
    """Make `folder` this run's: accept our own to resume, refuse another run's unless told to overwrite it."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another --out")
    record = folder / "recipe.yaml"
    there = [p.name for p in folder.iterdir()] if folder.exists() else []
    strangers = [name for name in there if not any(fnmatch(name, ours) for ours in OURS)]
    if strangers and (overwrite or not record.exists()):
        raise ValueError(f"{folder} holds what no run of ours wrote ({strangers[0]}): choose another --out")
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    if record.exists() and record.read_text() != text:
        raise ValueError(f"{folder} holds another run ({change()}): choose another --out, or --overwrite to lose it")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(record, text)


def _recorded(name: str, r: Recipe, folder: Path) -> str:
    """The recipe as text: as the folder has it if that is the same recipe (an older version may say less), or new."""
    record = folder / "recipe.yaml"
    try:
        if record.is_file() and find.resolve(str(record)) == (name, r):
            return record.read_text()
    except ValueError:
        pass  # not ours, or not readable any more: `_claim` will say so
    return dump(name, r)


def train(name: str, r: Recipe, folder: Path, overwrite: bool = False, track: Sequence[str] = ()) -> Path:
    """Run a recipe into `folder`, or go on where it stopped; returns the folder of the student. `track`: train/track.py.

    Under torchrun every process calls this and takes an equal part of each step's prompts; what is written is the first's.
    """
    check_trackers(track)
    if r.few_bits:
        library()
    device = load.device_of(r.device)
    with parallel.processes(device) as team, load.running_on(device):
        r.check_shares(team.size)
        return _train(name, r, folder, overwrite and not team.rank, team, track)


def _train(name: str, r: Recipe, folder: Path, overwrite: bool, team: Team, track: Sequence[str]) -> Path:
    torch.set_num_threads(r.threads)
    encoded = open_cache(r)  # which is quick to miss, and a teacher may have to be fetched
    load.folder_of(r.teacher)
    text = _recorded(name, r, folder)

    def change() -> str:
        return "; ".join(differences(find.resolve(str(folder / "recipe.yaml"))[1], r)) or "another recipe"

    if not team.rank:
        _claim(folder, text, overwrite, change)
    parallel.wait()
    done = checkpoint.newest(folder / "checkpoints")
    ended = done and (done[1]["step"] == r.iterations or exam.over(r, folder))
    if ended and (folder / "student" / load.NOTE).is_file():
        return folder / "student"
    backbone, data, players = stage(r, encoded, team)
    if encoded:
        encoded.read_by(load.reading(backbone))
    how = student_sampling(r)

    def look(step: int) -> None:
        with players.student.averaging() as net:
            if not team.rank:
                watch(backbone, net, how, data.look, data.null, folder, step)

    if encoded and encoded.drawn_by_teacher and not team.rank:
        print(DRAWN_BY_TEACHER, file=sys.stderr)
    deal = at_home(data.deal)
    loop.run(
        r.algorithm,
        players,
        deal,
        folder,
        seed=r.seed,
        steps=r.iterations,
        save_every=r.save_every,
        look_every=r.look_every,
        look=look,
        exam_every=r.exam_every,
        exam=lambda step: exam.sit(r, backbone, players.student, how, folder, step, team),
        over=lambda: exam.over(r, folder),
        extra=extra(players),
        fingerprint=_fingerprint(text, encoded),
        team=team,
        meter=_meter(r, backbone, deal),
        show=("student/match/loss", "fake/loss", "critic/gap", "reward/end"),
        verdict=(lambda: health.line(health.read(folder), r)) if health.ranges(r) else None,
        track=track,
        label=name,
    )
    _export(r, name, backbone, players, folder, folder / "student", team)
    parallel.wait()
    return folder / "student"


def _meter(r: Recipe, backbone: Any, deal: Deal) -> Meter:
    """Of the recipe's iterations, in forwards of its transformer."""
    batch = deal(0)[0]
    n = len(batch) if isinstance(r.algorithm, TwinFlow) else min(len(batch), r.algorithm.micro)
    x, t, cond = batch.real[:n], torch.full((n,), 0.5), batch.cond[:n]
    return Meter(lambda: backbone.velocity(backbone.net, x, t, cond), n, lambda i: sum(r.forwards(i).values()), len(batch))


def stage(r: Recipe, encoded: Caches | None, team: Team = ALONE) -> tuple[Any, Supply, Cast | Twin]:
    """Load a recipe's teacher on its device, its data and its players. With a cache, text encoders stay on disk."""
    if r.few_bits:
        library()
    with torch.device("cpu"):  # where all but the transformer stays
        size = encoded.resolution if encoded else None
        dtype = getattr(torch, r.base_dtype(team.size))
        backbone, _ = load.load(r.teacher, encoders=not encoded, dtype=dtype, resolution=size)
        if encoded is None and not load.in_miniature(backbone):
            raise ValueError(f"teacher={r.teacher} is not of the miniature: it needs data.folder, from advdmd encode")
        data = supply(r, backbone, encoded, team)
    device = load.device_of(r.device)
    if not r.spread_over(team.size):  # it goes there in shares
        if r.base_bits < 32:
            quantize(backbone.blocks(backbone.net), r.base_bits, backbone.dtype, device)
        backbone.net.to(device)
    data = data._replace(null=data.null.to(device), look=data.look.to(device))
    return backbone, data, make_players(r, backbone, data.null, data.prompts, team)


def _fingerprint(text: str, encoded: Caches | None) -> str:
    """Of a run: its recipe and, where it has one, its cache's plan."""
    return hashlib.sha256((text + (json.dumps(encoded.plan) if encoded else "")).encode()).hexdigest()


def _export(r: Recipe, name: str, backbone: Any, players: Cast | Twin, run: Path, out: Path, team: Team = ALONE) -> Path:
    """Write the averaged student as it is now or, where exams were sat, as it was at its best."""
    with players.student.averaging() as net:
        if team.rank:
            return out
        step = exam.load_best(run, net) if r.exam_every else 0
        note = {"recipe": name, "seed": r.seed, "iterations": step or r.iterations}
        note["forwards"] = r.forwards_until(note["iterations"]) * r.batch
        if not load.located(r.teacher).exists():  # on the hub, whose copy here is named after a revision
            note["base_model"] = r.teacher.partition("@")[0]
        if r.base_bits < 32:
            note["base_bits"] = r.base_bits
        if r.rewards:
            note["rewards"] = {kind: weight for weight, kind, _ in map(parse_reward, r.rewards)}
        drawn = [
            p for p in (run / "samples").glob("step-*.png") if p.stem[5:].isdecimal() and int(p.stem[5:]) <= note["iterations"]
        ]
        samples = max(drawn, default=None)
        return export_student(backbone, net, student_sampling(r), load.folder_of(r.teacher), out, note, samples)


def export_run(run: Path, out: Path, overwrite: bool = False) -> Path:
    """The averaged student of a run's newest checkpoint, as a stock diffusers folder."""
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run} is not a training run: it has no recipe.yaml")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        ours = (out / load.NOTE).is_file() and (out / "model_index.json").is_file()
        if not (overwrite and ours):
            raise ValueError(f"{out} is not empty: choose another --out" + (", or --overwrite" if ours else ""))
    text = (run / "recipe.yaml").read_text()
    name, r = find.resolve(str(run / "recipe.yaml"))
    if student_sampling(r).eta != 1:
        raise ValueError(f"eta={student_sampling(r).eta}: stock schedulers only know 1; train with algorithm.eta=1")
    # Where there is a card or not: what was trained on one can be exported without it.
    backbone, _, players = stage(replace(r, device="cpu"), encoded := open_cache(r))
    learners = {k: p for k, p in players._asdict().items() if isinstance(p, Learner)}
    if not checkpoint.resume(run / "checkpoints", learners, extra(players), _fingerprint(text, encoded)):
        raise ValueError(f"{run} holds no checkpoint yet: let advdmd train run on")
    return _export(r, name, backbone, players, run, out)


def mini(folder: Path, words: Sequence[str] = (), overwrite: bool = False, images: int = 96) -> dict[str, Any]:
    """The main job: distil the shipped mini-sd35 to 4 steps, score it beside its teacher, write table, grid, pipeline."""
    began = time.monotonic()
    name = "mini-sd35-advdmd"
    r = find.resolve(name, words)[1]
    if not isinstance(r.data, Data):
        raise ValueError("advdmd mini draws its own data: leave data.folder out, or use advdmd train")
    suite = Shapes("mini-geneval", images_per_task=images, world=r.data.world)
    steps, guided = r.algorithm.steps, load.sampling_of(load.folder_of(r.teacher))
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
    text = report.markdown(out)
    text += f"\nShare of the gap between {steps} and {guided.steps} teacher steps closed: {closed:.0%}. Took {took}.\n"
    write_text(folder / "table.md", text)
    write_text(folder / "table.json", json.dumps({"models": out, "gap_closed": closed}, indent=1))
    return {"table": text, "models": out, "gap_closed": closed, "student": student}


def _compare(models: Sequence[tuple[str, Sampling]], path: Path) -> None:
    """The same prompts and noise, one row a model."""
    prompts = [p for p in LOOK_PROMPTS for _ in range(2)]
    rows = []
    for m, how in models:
        backbone, _ = load.load(m)
        rows.append(painter(backbone, backbone.net, how)(prompts, [("compare", k) for k in range(len(prompts))]))
    write_image(path, grid_image(rows))


def paint(model: str, prompts: Sequence[str], folder: Path, how: Sampling | None = None, seed: int = 0) -> list[Path]:
    """Draw prompts with a model into `folder`; returns the files."""
    backbone, own = load.load(model)
    if load.in_miniature(backbone):
        for p in prompts:
            check_prompt(p)
            limit = backbone.pipe.tokenizer.model_max_length
            if len(backbone.pipe.tokenizer(p).input_ids) > limit:
                raise ValueError(f"prompt {p!r} is longer than the {limit - 2} words this model reads: say less")
    images = painter(backbone, backbone.net, how or own)(prompts, [("sample", k, seed) for k in range(len(prompts))])
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{k:03d}.png" for k in range(len(prompts))]
    for path, image in zip(paths, images, strict=True):
        write_image(path, Image.fromarray(image))
    return paths
