"""The verbs of the product as functions: train, paint, evaluate, export, and the main job of the miniature."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from advdmd.algorithms.twinflow import TwinFlow
from advdmd.commands.export import _export
from advdmd.data.embedding_cache import TEACHER_IMAGES_WARNING
from advdmd.data.loader import BatchFn, on_default_device
from advdmd.distillation import validation
from advdmd.distillation.batches import open_cache
from advdmd.distillation.build import extra_state, stage, student_sampling
from advdmd.distillation.run_folder import _claim, _fingerprint, _recorded
from advdmd.distillation.sample_grids import save_sample_grid
from advdmd.models import fingerprints, loading
from advdmd.models.quantization import import_bitsandbytes
from advdmd.monitoring import health
from advdmd.recipes import registry
from advdmd.recipes.overrides import diff
from advdmd.recipes.recipe import Recipe
from advdmd.training import checkpoint, distributed, trainer
from advdmd.training.efficiency import EfficiencyMeter
from advdmd.training.trackers import check_trackers
from advdmd.types import Ranks


def train(name: str, r: Recipe, folder: Path, overwrite: bool = False, track: Sequence[str] = ()) -> Path:
    """Run a recipe into `folder`, or go on where it stopped; returns the folder of the student. `track`: train/track.py.

    Under torchrun every process calls this and takes an equal part of each step's prompts; what is written is the first's.
    """
    check_trackers(track)
    if r.few_bits:
        import_bitsandbytes()
    device = loading.resolve_device(r.device)
    with distributed.init_distributed(device) as team, loading.default_device(device):
        r.check_shares(team.size)
        return _train(name, r, folder, overwrite and not team.rank, team, track)


def _train(name: str, r: Recipe, folder: Path, overwrite: bool, team: Ranks, track: Sequence[str]) -> Path:
    torch.set_num_threads(r.threads)
    encoded = open_cache(r)  # which is quick to miss, and a teacher may have to be fetched
    loading.pipeline_folder(r.teacher)
    text = _recorded(name, r, folder)

    def change() -> str:
        return "; ".join(diff(registry.resolve(str(folder / "recipe.yaml"))[1], r)) or "another recipe"

    if not team.rank:
        _claim(folder, text, overwrite, change)
    distributed.barrier()
    done = checkpoint.latest(folder / "checkpoints")
    ended = done and (done[1]["step"] == r.iterations or validation.should_stop_early(r, folder))
    if ended and (folder / "student" / loading.METADATA_FILE).is_file():
        return folder / "student"
    backbone, data, players = stage(r, encoded, team)
    if encoded:
        encoded.read_by(fingerprints.tokenization_fingerprint(backbone))
    how = student_sampling(r)

    def look(step: int) -> None:
        with players.student.averaging() as net:
            if not team.rank:
                save_sample_grid(backbone, net, how, data.look, data.null, folder, step)

    if encoded and encoded.drawn_by_teacher and not team.rank:
        print(TEACHER_IMAGES_WARNING, file=sys.stderr)
    deal = on_default_device(data.deal)
    trainer.train(
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
        exam=lambda step: validation.validate(r, backbone, players.student, how, folder, step, team),
        over=lambda: validation.should_stop_early(r, folder),
        extra=extra_state(players),
        fingerprint=_fingerprint(text, encoded),
        team=team,
        meter=_meter(r, backbone, deal),
        show=("student/match/loss", "fake/loss", "critic/gap", "reward/end"),
        verdict=(lambda: health.summary(health.read(folder), r)) if health.ranges_for(r) else None,
        track=track,
        label=name,
    )
    _export(r, name, backbone, players, folder, folder / "student", team)
    distributed.barrier()
    return folder / "student"


def _meter(r: Recipe, backbone: Any, deal: BatchFn) -> EfficiencyMeter:
    """Of the recipe's iterations, in forwards of its transformer."""
    batch = deal(0)[0]
    n = len(batch) if isinstance(r.algorithm, TwinFlow) else min(len(batch), r.algorithm.micro)
    x, t, cond = batch.real[:n], torch.full((n,), 0.5), batch.cond[:n]
    return EfficiencyMeter(
        lambda: backbone.velocity(backbone.net, x, t, cond), n, lambda i: sum(r.forwards(i).values()), len(batch)
    )
