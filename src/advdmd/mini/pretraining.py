"""Pre-training of the miniature's teachers.

An autoencoder, then flow matching with captions, each a resumable run in its folder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from advdmd import flow, losses
from advdmd.data.loader import sample_indices
from advdmd.files import write_folder
from advdmd.mini import dataset, pipelines
from advdmd.mini.world.scene import WORLDS
from advdmd.models.backbone import Backbone, Module, Pipeline
from advdmd.models.loading import backbone_from_pipeline, save_pipeline
from advdmd.models.qwen_image import use_2d_convs
from advdmd.progress import Progress
from advdmd.rng import Rng
from advdmd.training.learner import Learner
from advdmd.training.optimizer import OptimizerConfig, ParamGroup
from advdmd.training.trainer import Trainer
from advdmd.types import Columns, Json, StepMetrics

METADATA: Json = {"t5_length": 0, "side": pipelines.LATENT, "null_prompt": ""}  # what a backbone must know beside the pipeline
GUIDANCE_SCALE = 5.0  # the teachers' best at 40 steps (docs/log.md)


class PretrainingModels(NamedTuple):
    """The one network that is trained."""

    student: Learner


@dataclass(frozen=True)
class Examples(Columns):
    """Samples of a step: data [N, ...], pixels or latents, and token ids [N, ...] of captions, or None."""

    data: Tensor
    ids: Tensor | None = None


def reconstruction_loss(vae: Module, posterior: Module, pixels: Tensor, e: Tensor, kl_weight: float) -> Tensor:
    """Squared and absolute error of a reconstruction from the posterior, and the KL to a unit Gaussian per latent number. ->
    [N]

    pixels [N, 3, H, W] in [-1, 1]; e: standard normal noise of the latents' shape.
    """
    y = vae.decode(posterior.mean + posterior.std * e).sample
    error = losses.mean_flat((y - pixels).square()) + 0.1 * losses.mean_flat((y - pixels).abs())
    return error + kl_weight * posterior.kl().reshape(len(e), -1).sum(1) / e[0].numel()


@dataclass(frozen=True, kw_only=True)
class AutoencoderTraining:
    """Train encoder and decoder together: reconstruct what was sampled from the posterior, stay near a unit Gaussian."""

    kl_weight: float = 3e-4

    def train_step(self, models: PretrainingModels, batch: Examples, iteration: int, rng: Rng) -> StepMetrics:
        """One optimizer step on the reconstruction loss."""
        vae: Module = models.student.net
        posterior = vae.encode(batch.data).latent_dist
        e = rng.normal("posterior", posterior.mean.shape[1:])
        return models.student.update([reconstruction_loss(vae, posterior, batch.data, e, self.kl_weight)])


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Flow matching with logit-normal times (SD3, 2403.03206, Sec. 3.1).

    Captions are dropped with probability `drop`, for guidance.
    """

    drop: float = 0.1
    time_mean: float = 0.0
    time_std: float = 1.0

    def train_step(self, models: PretrainingModels, batch: Examples, iteration: int, rng: Rng) -> StepMetrics:
        """One optimizer step on the flow-matching loss."""
        x0, e = batch.data, rng.normal("e", batch.data.shape[1:])
        t = flow.logit_normal(rng.normal("t"), self.time_mean, self.time_std)
        keep = rng.uniform("drop") >= self.drop
        v = models.student(flow.interpolate(x0, e, t), t, batch.ids, keep)
        return models.student.update([losses.flow_matching(v, x0, e)])


@dataclass(frozen=True, kw_only=True)
class PretrainingStage:
    """One stage of pre-training on the miniature's world. Raises ValueError on values out of range."""

    model: Literal["autoencoder", "mini-sd3", "mini-sd35", "qwen-autoencoder", "mini-qwen"]
    origin: Literal["nothing", "autoencoder", "mini-sd35", "qwen-autoencoder", "mini-qwen"] = "nothing"  # its start
    algorithm: AutoencoderTraining | FlowMatching
    optimizer: OptimizerConfig
    size: pipelines.MiniConfig = pipelines.MiniConfig()
    world: Literal["full", "half"] = "half"
    batch: int = 64
    steps: int = 1000
    num_prompts: int = 20000
    ema_decay: float = 0.999
    seed: int = 0
    add_text_layer: bool = False
    save_every: int = 1000
    sample_every: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "num_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"PretrainingStage({name}={getattr(self, name)}): must be at least 1")


def draw_dataset(stage: PretrainingStage) -> dataset.MiniDataset:
    """The stage's scenes, drawn by as many processes as torch has threads."""
    progress = Progress("drawing scenes", stage.num_prompts)
    return dataset.make_dataset(stage.num_prompts, stage.seed, WORLDS[stage.world], progress, workers=torch.get_num_threads())


@torch.no_grad()
def _normalize_latents(vae: Module, pixels: Tensor, video: bool) -> None:
    """Write into the autoencoder's config what gives latents mean 0 and standard deviation 1 as the pipeline sees them."""
    z = torch.cat([vae.encode(x).latent_dist.mean for x in pixels.split(256)])
    if video:
        mean, std = ([round(v, 4) for v in f((0, 2, 3, 4)).tolist()] for f in (z.mean, z.std))
        vae.register_to_config(latents_mean=mean, latents_std=std)
    else:
        vae.register_to_config(shift_factor=round(z.mean().item(), 4), scaling_factor=round(1 / z.std().item(), 4))


def _trainer(
    stage: PretrainingStage, folder: Path, learner: Learner, batch_fn: Callable[[int], tuple[Examples, list[int]]], device: str
) -> Trainer:
    return Trainer(
        algorithm=stage.algorithm,
        models=PretrainingModels(learner),
        batch_fn=batch_fn,
        folder=folder,
        seed=stage.seed,
        iterations=stage.steps,
        save_every=stage.save_every,
        device=device,
        console_keys=(f"{learner.name}/loss",),
        label=stage.model,
    )


def train_autoencoder(stage: PretrainingStage, folder: Path, vae: Module, device: str) -> Module:
    """Train an autoencoder in place and return it with its EMA weights, latents normalised by its config.

    Saved in `folder`/vae.
    """
    pool, video = draw_dataset(stage), stage.model == "qwen-autoencoder"

    def images(i: Tensor) -> Tensor:
        return pool.pixels(i)[:, :, None] if video else pool.pixels(i)  # a video autoencoder takes an image as one frame

    if video:
        use_2d_convs(vae)
    vae.to(device)
    learner = Learner("vae", vae, vae, {"main": (stage.optimizer, [ParamGroup(vae.parameters())])}, ema_decay=stage.ema_decay)

    def batch_fn(step: int) -> tuple[Examples, list[int]]:
        i, ids = sample_indices(len(pool.prompts), stage.batch, stage.seed, step)
        return Examples(images(i)), ids

    vae.train()
    _trainer(stage, folder, learner, batch_fn, device).run()
    vae.load_state_dict(learner.ema_state_dict())
    vae.cpu().eval()
    _normalize_latents(vae, images(torch.arange(min(2048, stage.num_prompts))), video)
    write_folder(folder / "vae", vae.save_pretrained)
    return vae


class TransformerAndTextEncoders(nn.Module):
    """The networks that flow matching trains together: the transformer and its text encoders."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.transformer = backbone.net
        self.encoders = nn.ModuleList(backbone.encoders)


def train_flow(
    stage: PretrainingStage, folder: Path, pipe: Pipeline, device: str, save_samples: Callable[[Backbone, int], object]
) -> Pipeline:
    """Train transformer and text encoders of a pipeline in place; saves it with their EMA weights in `folder`/pipeline.

    save_samples(backbone with EMA weights, iteration) is called every stage.sample_every iterations.
    """
    backbone = backbone_from_pipeline(pipe, METADATA)
    pool = draw_dataset(stage)
    latents = dataset.encode_dataset(backbone, pool, Progress("encoding images", stage.num_prompts))[:, 0]
    *rows, null = backbone.tokenize([*pool.prompts, ""])  # together, so that all have one length
    ids, null = torch.stack(rows), null.to(device)
    net = TransformerAndTextEncoders(backbone).to(device)

    def call(x: Tensor, t: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
        cond = backbone.encode_text(torch.where(keep[:, None, None], ids, null))
        return backbone.velocity(backbone.net, x, t, cond)

    def batch_fn(step: int) -> tuple[Examples, list[int]]:
        i, samples = sample_indices(stage.num_prompts, stage.batch, stage.seed, step)
        return Examples(latents[i], ids[i]), samples

    learner = Learner("flow", net, call, {"main": (stage.optimizer, [ParamGroup(net.parameters())])}, ema_decay=stage.ema_decay)
    net.train()
    trainer = _trainer(stage, folder, learner, batch_fn, device)
    trainer.sample_every = stage.sample_every
    trainer.save_samples = lambda iteration: save_samples(learner.ema_copy(backbone), iteration)
    trainer.run()
    net.load_state_dict(learner.ema_state_dict())
    net.cpu().eval()
    metadata = {"name": stage.model, "sampling": {"steps": 40, "guidance": GUIDANCE_SCALE}, **METADATA}
    write_folder(folder / "pipeline", lambda p: save_pipeline(pipe, p, metadata))
    return pipe
