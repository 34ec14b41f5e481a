"""The command train: run a recipe into a folder, or resume it."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from advdmd.commands.export import export_ema_student
from advdmd.data.loader import BatchFn, DataSource
from advdmd.distillation import memory
from advdmd.distillation.build import setup
from advdmd.distillation.cost import forward_operations
from advdmd.distillation.micro_batch import fitted, proven
from advdmd.distillation.prompt_validation import encoded_prompts, load_scorers, prompt_validation, read_prompts
from advdmd.distillation.run_folder import create_or_resume, run_fingerprint
from advdmd.distillation.sample_grids import save_sample_grid
from advdmd.distillation.validation import START_FILE, record, record_start, should_stop_early
from advdmd.models import devices, loading
from advdmd.models.backbone import Backbone
from advdmd.models.images import image_sampler
from advdmd.models.lora_files import lora_file
from advdmd.models.quantization import import_bitsandbytes
from advdmd.models.qwen_image_edit import check_source_images
from advdmd.monitoring import health
from advdmd.recipes.recipe import Recipe
from advdmd.training import checkpoint, distributed
from advdmd.training.efficiency import EfficiencyMeter, matrix_rate
from advdmd.training.trackers import check_trackers
from advdmd.training.trainer import Trainer
from advdmd.types import ONE_RANK, Metrics, Prompt, Ranks

CONSOLE_KEYS = ("student/dm_loss", "fake_score/loss", "discriminator/logit_gap", "reward/final")


def train(name: str, recipe: Recipe, out: str | Path, overwrite: bool = False, trackers: Sequence[str] = ()) -> Path:
    """Run a recipe into the folder `out`, or resume the run there; returns the folder of the student.

    name: of the recipe, for the record. trackers: names in training.trackers.

    Under torchrun every process calls this and takes an equal part of each step's prompts; rank 0 writes. Raises ValueError,
    before any long work, on what is missing, damaged or does not fit; FloatingPointError if a loss is not finite.
    """
    check_trackers(trackers)
    if recipe.uses_bitsandbytes:
        import_bitsandbytes()
    with distributed.init_distributed(devices.resolve_device(recipe.device)) as ranks:
        recipe.check_world_size(ranks.world_size)
        with devices.float32_precision(recipe.base_dtype(ranks.world_size)):
            return _train(name, recipe, Path(out), overwrite and not ranks.rank, ranks, trackers)


def _train(name: str, r: Recipe, folder: Path, overwrite: bool, ranks: Ranks, trackers: Sequence[str]) -> Path:
    torch.set_num_threads(r.threads)
    main, student_folder = not ranks.rank, folder / "student"
    source = r.data.open(r.teacher)  # quick to fail, and a teacher may have to be fetched
    pipeline = loading.pipeline_class(loading.pipeline_folder(r.teacher))
    if r.teacher_lora:
        lora_file(r.teacher_lora)
    prompts: list[Prompt] = []
    if r.validation.prompts:
        prompts = read_prompts(Path(r.validation.prompts), pipeline in loading.EDIT_PIPELINES)
    check_source_images(pipeline, prompts)
    scorers = load_scorers(r)
    if "-advdmd-reinforce" in name and not r.student:
        raise ValueError(f"{name} goes on from a few-step student: set student=FOLDER, a LoRA file or a hub id")
    if main:
        create_or_resume(folder, name, r, overwrite)
    distributed.barrier()
    if _has_ended(r, folder) and (student_folder / loading.METADATA_FILE).is_file():
        return student_folder
    _warn_of_memory(r, source, ranks)
    begins = checkpoint.latest(folder / "checkpoints") is None  # a run that goes on has its student's weights
    automatic = r.algorithm.fits_passes_to_gpu
    gpu_memory = memory.this_gpu(devices.resolve_device(r.device))
    r = fitted(r, source.resolution, ranks.world_size, gpu_memory, source.source_images)
    backbone, data, models = setup(r if begins else replace(r, student=""), source, ranks)
    if automatic and not r.uses_fsdp(ranks.world_size):
        r = proven(r, backbone, models, data.batch_fn, ranks)
    sampler, validation, encode, shared = r.algorithm.sampler(), source.validation(r.eval_images), None, False
    if r.validation.prompts:
        shared = not r.uses_fsdp(ranks.world_size)  # of sharded networks the first process alone has a whole one
        drawing = ranks if shared else ONE_RANK
        validation = prompt_validation(prompts, scorers, r.validation.images, drawing, backbone.device)
        if not source.needs_encoders:
            with distributed.main_process_first():
                encode = encoded_prompts(r, backbone, prompts, folder)

    def save_samples(iteration: int) -> None:
        net = models.student.ema_model()
        if main:
            save_sample_grid(backbone, net, sampler, data.sample_cond, data.null, folder, iteration)

    def scores(iteration: int) -> Metrics:
        net = models.student.ema_model()
        if validation is None or not (main or shared):
            return {}
        found = validation(image_sampler(backbone, net, sampler, encode=encode))
        if main and not iteration:
            record_start(found, folder)
        return record(r, found, net, folder, iteration) if main and iteration else {}

    if r.student and r.eval_every and begins and not (folder / START_FILE).is_file():
        scores(0)
    if source.warning and main:
        print(source.warning, file=sys.stderr)
    Trainer(
        algorithm=r.algorithm,
        models=models,
        batch_fn=data.batch_fn,
        folder=folder,
        seed=r.seed,
        iterations=r.iterations,
        save_every=r.save_every,
        device=backbone.device,
        ranks=ranks,
        extra_state=r.algorithm.extra_state(models),
        fingerprint=run_fingerprint(r, source.plan),
        data_contents=source.contents,
        sample_every=r.sample_every,
        save_samples=save_samples,
        eval_every=r.eval_every,
        validate=scores,
        should_stop=lambda: should_stop_early(r, folder),
        efficiency=_efficiency_meter(r, backbone, data.batch_fn),
        console_keys=CONSOLE_KEYS,
        health=(lambda: health.summary(health.read_metrics(folder), r)) if health.ranges_for(r) else None,
        trackers=trackers,
        label=name,
    ).run()
    done = checkpoint.newest_step(folder / "checkpoints")
    export_ema_student(r, name, backbone, models.student, folder, student_folder, done, ranks)
    distributed.barrier()
    return student_folder


def _warn_of_memory(r: Recipe, source: DataSource, ranks: Ranks) -> None:
    """One line on stderr if the GPU is too small for a recipe and its encoded images. The miniature always fits."""
    if source.resolution is None or ranks.rank:
        return
    device, nodes = devices.resolve_device(r.device), distributed.num_nodes()
    if text := memory.warning(r, source.resolution, ranks.world_size, device, nodes, source.source_images):
        print(f"warning: {text}; measured peaks were within 12 % of such estimates", file=sys.stderr)


def _has_ended(r: Recipe, folder: Path) -> bool:
    newest = checkpoint.latest(folder / "checkpoints")
    return newest is not None and (newest[1]["step"] == r.iterations or should_stop_early(r, folder))


def _efficiency_meter(r: Recipe, backbone: Backbone, batch_fn: BatchFn) -> EfficiencyMeter:
    """Of the recipe's iterations, in forward passes of its transformer."""
    batch = batch_fn(0)[0].to(backbone.device)
    n = r.algorithm.samples_per_pass(len(batch))
    x, t, cond = batch.real_latents[:n], torch.full((n,), 0.5, device=backbone.device), batch.cond[:n]
    known = type(backbone.net).__name__.removeprefix("FSDP") in memory.COUNTED  # FSDP2's name of a sharded class
    height, width = x.shape[-2:]
    tokens = memory.tokens_of(backbone.net, height, width, cond.source) if known else 0
    return EfficiencyMeter(
        lambda: backbone.velocity(backbone.net, x, t, cond),
        n,
        lambda i: sum(r.forwards(i).values()),
        len(batch),
        forward_operations(backbone.net, tokens, cond.embeds.shape[1]) if known else 0.0,
        lambda: matrix_rate(backbone.device, backbone.dtype) if known else 0.0,
    )
