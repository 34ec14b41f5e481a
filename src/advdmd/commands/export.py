"""The command export: a run's student as a stock diffusers folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from advdmd.algorithms.base import DistillationModels
from advdmd.algorithms.twinflow import TwinFlowModels
from advdmd.distillation import validation
from advdmd.distillation.batches import open_cache
from advdmd.distillation.build import extra_state, stage, student_sampling
from advdmd.distillation.run_folder import _fingerprint
from advdmd.exporters.diffusers import export_student
from advdmd.models import loading
from advdmd.recipes import registry
from advdmd.recipes.recipe import Recipe
from advdmd.rewards.registry import parse_reward
from advdmd.training import checkpoint
from advdmd.training.learner import Learner
from advdmd.types import ONE_RANK, Ranks


def _export(
    r: Recipe,
    name: str,
    backbone: Any,
    players: DistillationModels | TwinFlowModels,
    run: Path,
    out: Path,
    team: Ranks = ONE_RANK,
) -> Path:
    """Write the averaged student as it is now or, where exams were sat, as it was at its best."""
    with players.student.averaging() as net:
        if team.rank:
            return out
        step = validation.load_best(run, net) if r.exam_every else 0
        note = {"recipe": name, "seed": r.seed, "iterations": step or r.iterations}
        note["forwards"] = r.forwards_until(note["iterations"]) * r.batch
        if not loading.shipped_or_path(r.teacher).exists():  # on the hub, whose copy here is named after a revision
            note["base_model"] = r.teacher.partition("@")[0]
        if r.base_bits < 32:
            note["base_bits"] = r.base_bits
        if r.rewards:
            note["rewards"] = {kind: weight for weight, kind, _ in map(parse_reward, r.rewards)}
        drawn = [
            p for p in (run / "samples").glob("step-*.png") if p.stem[5:].isdecimal() and int(p.stem[5:]) <= note["iterations"]
        ]
        samples = max(drawn, default=None)
        return export_student(backbone, net, student_sampling(r), loading.pipeline_folder(r.teacher), out, note, samples)


def export_run(run: Path, out: Path, overwrite: bool = False) -> Path:
    """The averaged student of a run's newest checkpoint, as a stock diffusers folder."""
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run} is not a training run: it has no recipe.yaml")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        ours = (out / loading.METADATA_FILE).is_file() and (out / "model_index.json").is_file()
        if not (overwrite and ours):
            raise ValueError(f"{out} is not empty: choose another --out" + (", or --overwrite" if ours else ""))
    text = (run / "recipe.yaml").read_text()
    name, r = registry.resolve(str(run / "recipe.yaml"))
    if student_sampling(r).eta != 1:
        raise ValueError(f"eta={student_sampling(r).eta}: stock schedulers only know 1; train with algorithm.eta=1")
    # Where there is a card or not: what was trained on one can be exported without it.
    backbone, _, players = stage(replace(r, device="cpu"), encoded := open_cache(r))
    learners = {k: p for k, p in players._asdict().items() if isinstance(p, Learner)}
    if not checkpoint.resume(run / "checkpoints", learners, extra_state(players), _fingerprint(text, encoded)):
        raise ValueError(f"{run} holds no checkpoint yet: let advdmd train run on")
    return _export(r, name, backbone, players, run, out)
