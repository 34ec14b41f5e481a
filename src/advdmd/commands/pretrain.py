"""The command pretrain: one stage of a miniature teacher, by name, into its folder."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from advdmd.distillation.sample_grids import save_sample_grid
from advdmd.files import file_hash, read_object, write_folder, write_text
from advdmd.mini import pipelines
from advdmd.mini.pretraining import GUIDANCE_SCALE, PretrainingStage, train_autoencoder, train_flow
from advdmd.mini.prompts import SAMPLE_PROMPTS
from advdmd.mini.world.caption import VOCABULARY
from advdmd.models import devices, loading
from advdmd.models.backbone import Backbone, Module, Pipeline
from advdmd.models.sampler import SamplerConfig, encode_prompts
from advdmd.recipes.mini import STAGES


def pretrain(
    stage: str, folder: Path, start: Path | None, steps: int | None, threads: int, device: str = "cpu"
) -> Module | Pipeline:
    """Run one stage by name into `folder`, or resume it; returns the autoencoder or the pipeline.

    start: what the stage starts from: nothing, an autoencoder's vae folder, or a pipeline of the miniature (or a shipped name).
    device: one of devices.DEVICES. Scenes are drawn by as many processes as there are `threads`. Raises ValueError on an
    unknown stage, a start that does not fit, or a folder of another stage.
    """
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r}: one of {', '.join(STAGES)}")
    plan = STAGES[stage]()
    if steps is not None:
        plan = replace(plan, steps=steps, optimizer=replace(plan.optimizer, decay_steps=steps))
    torch.set_num_threads(threads)
    device = devices.resolve_device(device)
    source = None if plan.origin == "nothing" else _check_start(stage, plan.origin, start)
    _create_or_resume(folder, plan, file_hash(loading.weights_file(source)) if source else "nothing")
    with devices.float32_precision("float32"):
        if plan.model.endswith("autoencoder"):
            vae = _load_autoencoder(source) if source else _new_autoencoder(plan)
            return train_autoencoder(plan, folder, vae, device)
        assert source
        return _train_flow(plan, folder, source, device)


def _create_or_resume(folder: Path, plan: PretrainingStage, origin: str) -> None:
    """Make a folder this stage's. Raises ValueError if it is of another stage, setting or start."""
    record, text = folder / "stage.json", json.dumps(asdict(plan) | {"start": origin}, indent=1)
    if record.exists() and record.read_text() != text:
        raise ValueError(f"{folder} holds another stage, or one with other settings: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(record, text)


def _check_start(stage: str, origin: str, start: Path | None) -> Path:
    """The folder that a stage starts from. Raises ValueError if it is missing or of another kind than stage `origin` makes."""
    file, kind, made = {
        "autoencoder": ("config.json", "AutoencoderKL", "the vae folder"),
        "qwen-autoencoder": ("config.json", "AutoencoderKLQwenImage", "the vae folder"),
        "mini-sd35": ("model_index.json", "StableDiffusion3Pipeline", "the pipeline folder"),
        "mini-qwen": ("model_index.json", "QwenImagePipeline", "the pipeline folder"),
    }[origin]
    hint = f"{stage} needs --start FOLDER, {made} of: advdmd pretrain {origin} --out DIR"
    if start is None or not (loading.shipped_or_path(start) / file).is_file():
        raise ValueError(hint)
    source = loading.shipped_or_path(start)
    found = read_object(source / file, hint=hint).get("_class_name")
    if found != kind:
        raise ValueError(f"{start} holds a {found}, not a {kind}: {hint}")
    return source


def _load_autoencoder(folder: Path) -> Module:
    """The autoencoder of a vae folder, of whichever class it is."""
    import diffusers

    kind = read_object(folder / "config.json", "_class_name", hint="make it again")["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()


def _new_autoencoder(plan: PretrainingStage) -> Module:
    torch.manual_seed(plan.seed)
    make = pipelines.qwen_autoencoder if plan.model == "qwen-autoencoder" else pipelines.autoencoder
    return make(plan.size)


def _pipeline(plan: PretrainingStage, source: Path, first: Path) -> Pipeline:
    """What a stage trains, kept in `first` as it was before the first update.

    A stage that was stopped goes on with the same tokenizers, whose trainer numbers tokens differently each time.
    """
    if first.exists():
        return loading.load_pipeline(first)
    if any((first.parent / "checkpoints").glob("*.json")):
        raise ValueError(f"{first.parent} was begun by an earlier version, whose tokenizers are lost: choose another --out")
    if plan.origin == "autoencoder":
        pipe = pipelines.sd3(VOCABULARY, plan.size, sd35=True, seed=plan.seed, vae=_load_autoencoder(source))
    elif plan.origin == "qwen-autoencoder":
        pipe = pipelines.qwen_image(VOCABULARY, plan.size, seed=plan.seed, vae=_load_autoencoder(source))
    else:
        pipe = loading.load_pipeline(source)
        if plan.add_text_layer:
            pipelines.add_text_layer(pipe)
        if plan.model == "mini-sd3":
            pipelines.as_sd3(pipe, plan.seed)
    write_folder(first, lambda p: loading.save_pipeline(pipe, p, {}))
    return pipe


def _train_flow(plan: PretrainingStage, folder: Path, source: Path, device: str) -> Pipeline:
    pipe = _pipeline(plan, source, folder / "start")
    sampler = SamplerConfig(steps=20, guidance_scale=GUIDANCE_SCALE)

    def save_samples(backbone: Backbone, iteration: int) -> None:
        cond, null = (encode_prompts(backbone, p, backbone.device) for p in (SAMPLE_PROMPTS, [backbone.null_prompt]))
        save_sample_grid(backbone, backbone.net, sampler, cond, null, folder, iteration)

    return train_flow(plan, folder, pipe, device, save_samples)
