"""The verb pretrain: one stage of a miniature teacher, by name, into a folder of its own."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from advdmd.models import load, mini
from advdmd.recipes.mini import STAGES
from advdmd.train import checkpoint, pretraining
from advdmd.world.caption import VOCABULARY


def _claim_stage(folder: Path, plan: pretraining.Stage, origin: str) -> None:
    """A stage's folder is its own: another stage, setting or starting point is refused."""
    record, text = folder / "stage.json", json.dumps(asdict(plan) | {"start": origin}, indent=1)
    if record.exists() and record.read_text() != text:
        raise ValueError(f"{folder} holds another stage, or one with other settings: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(record, text)


def pretrain(stage: str, folder: Path, start: Path | None, steps: int | None, threads: int) -> Any:
    """Run one stage by name into `folder`, or go on where it stopped.

    `start`: for a teacher the autoencoder's vae folder, for a second cycle ("...-again") the pipeline it goes on from.
    """
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r}: one of {', '.join(STAGES)}")
    plan = STAGES[stage]()
    if steps is not None:
        plan = replace(plan, steps=steps, optim=replace(plan.optim, decay=steps))
    torch.set_num_threads(threads)
    origin = checkpoint.file_hash(load.weights_file(start)) if start is not None else "nothing"
    if stage == "autoencoder":
        torch.manual_seed(plan.seed)
        _claim_stage(folder, plan, origin)
        return pretraining.train_autoencoder(plan, folder, mini.autoencoder(plan.size))
    if stage.endswith("-again"):
        if start is None:
            raise ValueError(f"{stage} needs --start FOLDER, the pipeline that advdmd pretrain {plan.model} made")
        pipe = load.load_pipeline(load.folder_of(str(start)))
        _claim_stage(folder, plan, origin)
        return pretraining.train_flow(plan, folder, pipe)
    if start is None or not (start / "config.json").is_file():
        raise ValueError(f"{stage} needs --start FOLDER, DIR/vae of: advdmd pretrain autoencoder --out DIR")
    _claim_stage(folder, plan, origin)
    from diffusers import AutoencoderKL

    codec = AutoencoderKL.from_pretrained(start, local_files_only=True).eval()
    pipe = mini.sd3(VOCABULARY, plan.size, sd35=plan.model == "mini-sd35", seed=plan.seed, vae=codec)
    return pretraining.train_flow(plan, folder, pipe)
