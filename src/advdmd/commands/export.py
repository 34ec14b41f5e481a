"""The command export: a run's student as a stock diffusers folder."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from advdmd.distillation.build import restore
from advdmd.distillation.validation import load_best
from advdmd.evaluation.judges.scorers import judge_name
from advdmd.exporters.diffusers import export_adapter, export_student
from advdmd.models import loading
from advdmd.models.backbone import Backbone
from advdmd.models.lora_files import LORA_FILE, parse_lora, plain_network, read_lora
from advdmd.recipes import registry
from advdmd.recipes.recipe import Recipe
from advdmd.rewards.registry import parse_reward
from advdmd.training.learner import Learner
from advdmd.types import ONE_RANK, Json, Ranks


def export(
    run: str | Path, out: str | Path, overwrite: bool = False, changes: Sequence[str] = (), only: str | None = None
) -> Path:
    """Write the EMA student of a run into the folder `out`; returns it. `overwrite` may replace an export.

    only: "speed" writes the student's adapter alone, without a LoRA of its teacher.

    changes: "key=value" of what may change in a run (run_folder.CHANGEABLE), such as where its cache is now.

    The student is that of the newest checkpoint or, with validation, that of the best validation score.

    Raises ValueError if `run` is no run or has no checkpoint, if its student cannot be sampled by stock schedulers, or if `out`
    holds something else.
    """
    run, out = Path(run), Path(out)
    if only not in (None, "speed"):
        raise ValueError(f"only={only}: speed is the one part that can be exported alone")
    record = run / "recipe.yaml"
    if not record.is_file():
        raise ValueError(f"{run} is not a training run: it has no recipe.yaml")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        export = (out / loading.METADATA_FILE).is_file() and (out / "model_index.json").is_file()
        export = export or ((out / LORA_FILE).is_file() and (out / "README.md").is_file())
        if not (overwrite and export):
            raise ValueError(f"{out} is not empty: choose another --out" + (", or --overwrite" if export else ""))
    name, r = registry.resolve(str(record), changes)
    if (eta := r.algorithm.sampler().eta) != 1:
        raise ValueError(f"eta={eta}: stock schedulers only know 1; train with algorithm.eta=1")
    # Whether there is a GPU or not: what was trained on one can be exported without it.
    (backbone, _, models), done = restore(run, replace(r, device="cpu"))
    return export_ema_student(r, name, backbone, models.student, run, out, done, only=only)


def export_ema_student(
    r: Recipe,
    name: str,
    backbone: Backbone,
    student: Learner,
    run: Path,
    out: Path,
    iterations: int,
    ranks: Ranks = ONE_RANK,
    only: str | None = None,
) -> Path:
    """Write the EMA student as it is now or, where there were validations, as it was at its best. All ranks must call this.

    iterations: that it has had by now.
    """
    net = student.ema_model()
    if ranks.rank:
        return out
    iteration = load_best(run, net) if r.eval_every else 0
    metadata: Json = {"recipe": name, "seed": r.seed, "iterations": iteration or iterations}
    metadata["forwards"] = r.forwards_until(metadata["iterations"]) * r.batch
    if not loading.shipped_or_path(r.teacher).exists():  # on the hub, whose copy here is named after a revision
        metadata["base_model"] = r.teacher.partition("@")[0]
    if r.base_bits < 32:
        metadata["base_bits"] = r.base_bits
    if r.rewards:
        metadata["rewards"] = {judge_name(kind, where): weight for weight, kind, where in map(parse_reward, r.rewards)}
    if r.student:
        metadata["started_from"] = _public_name(r.student)
    sampler, teacher = r.algorithm.sampler(), loading.pipeline_folder(r.teacher)
    if only:
        about: Json = {"sampling": {"steps": sampler.steps, "shift": sampler.shift, "eta": sampler.eta}}
        about |= {"stock_load": backbone.pipeline_load_kwargs, "stock_call": backbone.pipeline_call_kwargs(sampler.steps)}
        about |= backbone.metadata
        return export_adapter(net, teacher, out, metadata | about)
    style = None
    if r.teacher_lora:
        source, scale = parse_lora(r.teacher_lora)
        metadata["teacher_lora"] = f"{_public_name(source)}:{scale:g}"
        style = read_lora(r.teacher_lora, plain_network(backbone.net))
    grids = [
        p for p in (run / "samples").glob("step-*.png") if p.stem[5:].isdecimal() and int(p.stem[5:]) <= metadata["iterations"]
    ]
    return export_student(backbone, net, sampler, teacher, out, metadata, max(grids, default=None), style)


def _public_name(source: str) -> str:
    """A hub id as it is, a file or folder of this machine without the way to it: metadata are published."""
    path = Path(source).expanduser()
    return path.name if path.exists() else source
