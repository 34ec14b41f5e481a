"""The verb pretrain: one stage of a miniature teacher, by name, into a folder of its own."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from advdmd.distillation.sample_grids import save_sample_grid
from advdmd.files import file_hash, read_object, write_folder, write_text
from advdmd.mini import pipelines, pretraining
from advdmd.mini.prompts import SAMPLE_PROMPTS
from advdmd.mini.world.caption import VOCABULARY
from advdmd.models import loading
from advdmd.models.sampler import SamplerConfig, encode_prompts
from advdmd.recipes.mini import STAGES


def _claim_stage(folder: Path, plan: pretraining.PretrainingStage, origin: str) -> None:
    """A stage's folder is its own: another stage, setting or starting point is refused."""
    record, text = folder / "stage.json", json.dumps(asdict(plan) | {"start": origin}, indent=1)
    if record.exists() and record.read_text() != text:
        raise ValueError(f"{folder} holds another stage, or one with other settings: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(record, text)


def _started(stage: str, origin: str, start: Path | None) -> Path:
    """The folder a stage goes on from; raises ValueError if it is missing or of another kind than `origin` makes."""
    file, kind, made = {
        "autoencoder": ("config.json", "AutoencoderKL", "the vae folder"),
        "qwen-autoencoder": ("config.json", "AutoencoderKLQwenImage", "the vae folder"),
        "mini-sd35": ("model_index.json", "StableDiffusion3Pipeline", "the pipeline folder"),
        "mini-qwen": ("model_index.json", "QwenImagePipeline", "the pipeline folder"),
    }[origin]
    way_out = f"{stage} needs --start FOLDER, {made} of: advdmd pretrain {origin} --out DIR"
    if start is None or not (loading.shipped_or_path(start) / file).is_file():
        raise ValueError(way_out)
    source = loading.shipped_or_path(start)
    found = read_object(source / file, way_out=way_out).get("_class_name")
    if found != kind:
        raise ValueError(f"{start} holds a {found}, not a {kind}: {way_out}")
    return source


def _codec(folder: Path) -> Any:
    """The autoencoder of a vae folder, of whichever class it is."""
    import diffusers

    kind = read_object(folder / "config.json", "_class_name", way_out="make it again")["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()


def _fresh_codec(plan: pretraining.PretrainingStage) -> Any:
    torch.manual_seed(plan.seed)
    make = pipelines.qwen_autoencoder if plan.model == "qwen-autoencoder" else pipelines.autoencoder
    return make(plan.size)


def _pipeline(plan: pretraining.PretrainingStage, source: Path, first: Path) -> Any:
    """What a stage trains, kept in `first` as it was before the first update: a stage that was stopped goes on with the same
    tokenizers, whose trainer numbers tokens differently each time."""
    if first.exists():
        return loading.load_pipeline(first)
    if any((first.parent / "checkpoints").glob("*.json")):
        raise ValueError(f"{first.parent} was begun by an earlier version, whose tokenizers are lost: choose another --out")
    if plan.origin == "autoencoder":
        pipe = pipelines.sd3(VOCABULARY, plan.size, sd35=True, seed=plan.seed, vae=_codec(source))
    elif plan.origin == "qwen-autoencoder":
        pipe = pipelines.qwen_image(VOCABULARY, plan.size, seed=plan.seed, vae=_codec(source))
    else:
        pipe = loading.load_pipeline(source)
        if plan.deepen:
            pipelines.add_text_layer(pipe)
        if plan.model == "mini-sd3":
            pipelines.as_sd3(pipe, plan.seed)
    write_folder(first, lambda p: loading.save_pipeline(pipe, p, {}))
    return pipe


def pretrain(stage: str, folder: Path, start: Path | None, steps: int | None, threads: int, device: str = "cpu") -> Any:
    """Run one stage by name into `folder`, or go on where it stopped.

    `start`: what it goes on from: nothing, an autoencoder's vae folder, or a miniature's pipeline (a shipped name will do).
    `device`: auto, cpu or cuda; scenes are drawn by as many processes as there are `threads`.
    """
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r}: one of {', '.join(STAGES)}")
    plan = STAGES[stage]()
    if steps is not None:
        plan = replace(plan, steps=steps, optim=replace(plan.optim, decay=steps))
    torch.set_num_threads(threads)
    device = loading.resolve_device(device)
    source = None if plan.origin == "nothing" else _started(stage, plan.origin, start)
    _claim_stage(folder, plan, file_hash(loading.weights_file(source)) if source else "nothing")
    with loading.default_device(device):
        return _train(plan, folder, source)


def _train(plan: pretraining.PretrainingStage, folder: Path, source: Path | None) -> Any:
    """What the stage makes: an autoencoder or a pipeline."""
    here = torch.device("cpu")  # where all begin with the same numbers
    if plan.model.endswith("autoencoder"):
        with here:
            vae = _codec(source) if source else _fresh_codec(plan)
        return pretraining.train_autoencoder(plan, folder, vae)
    assert source
    with here:
        pipe = _pipeline(plan, source, folder / "start")
    how = SamplerConfig(steps=20, guidance=pretraining.GUIDANCE)

    @torch.no_grad()
    def look(backbone: Any, step: int) -> None:
        cond, null = (encode_prompts(backbone, p, backbone.net.device) for p in (SAMPLE_PROMPTS, [""]))
        save_sample_grid(backbone, backbone.net, how, cond, null, folder, step)

    return pretraining.train_flow(plan, folder, pipe, look)
