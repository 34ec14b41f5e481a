"""The stages that make the miniature teachers, each a resumable run in its own folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from advdmd import flow, losses
from advdmd.data.loader import on_default_device, sample_indices
from advdmd.files import write_folder
from advdmd.mini import dataset, pipelines
from advdmd.mini.world.scene import WORLDS
from advdmd.models.backbone import Backbone
from advdmd.models.loading import backbone_from_pipeline, save_pipeline
from advdmd.models.qwen_image import use_2d_convs
from advdmd.progress import Progress
from advdmd.rng import Rng, to_default_device
from advdmd.training import trainer
from advdmd.training.learner import Learner
from advdmd.training.optimizer import OptimizerConfig
from advdmd.types import Batch, Metrics


class PretrainingModels(NamedTuple):
    """The one player of pre-training."""

    student: Any


def reconstruction_loss(vae: Any, posterior: Any, pixels: Tensor, e: Tensor, kl_weight: float) -> Tensor:
    """[N] squared and absolute error of a noisy reconstruction, plus the KL to a unit Gaussian per latent number."""
    y = vae.decode(posterior.mean + posterior.std * e).sample
    error = losses.mean_flat((y - pixels).square()) + 0.1 * losses.mean_flat((y - pixels).abs())
    return error + kl_weight * posterior.kl().reshape(len(e), -1).sum(1) / e[0].numel()


@dataclass(frozen=True, kw_only=True)
class AutoencoderTraining:
    """Encoder and decoder together: reconstruct what was sampled from the posterior, stay near a unit Gaussian."""

    kl_weight: float = 3e-4

    def iteration(self, cast: PretrainingModels, batch: Batch, step: int, rng: Rng) -> Metrics:
        vae, pixels = cast.student.net, batch.real
        posterior = vae.encode(pixels).latent_dist
        e = rng.normal("posterior", posterior.mean.shape[1:])
        return cast.student.descend([reconstruction_loss(vae, posterior, pixels, e, self.kl_weight)])


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Flow matching with logit-normal times (SD3, 2403.03206, Sec. 3.1) and captions dropped for guidance."""

    drop: float = 0.1
    time_mean: float = 0.0
    time_std: float = 1.0

    def iteration(self, cast: PretrainingModels, batch: Batch, step: int, rng: Rng) -> Metrics:
        x0, e = batch.real, rng.normal("e", batch.real.shape[1:])
        t = flow.logit_normal(rng.normal("t"), self.time_mean, self.time_std)
        keep = rng.uniform("drop") >= self.drop
        v = cast.student(flow.interpolate(x0, e, t), t, batch.cond, keep)
        return cast.student.descend([losses.flow_matching(v, x0, e)])


METADATA = {"t5_length": 0, "side": pipelines.LATENT}  # what a backbone must know beside the pipeline
GUIDANCE = 5.0  # the teachers' best guidance scale at 40 steps (docs/log.md)


@dataclass(frozen=True, kw_only=True)
class PretrainingStage:
    """One stage of pre-training on the miniature world."""

    model: Literal["autoencoder", "mini-sd3", "mini-sd35", "qwen-autoencoder", "mini-qwen"]
    origin: Literal["nothing", "autoencoder", "mini-sd35", "qwen-autoencoder", "mini-qwen"] = "nothing"  # what it goes on from
    algorithm: AutoencoderTraining | FlowMatching
    optim: OptimizerConfig
    size: pipelines.MiniConfig = pipelines.MiniConfig()
    world: Literal["full", "half"] = "half"
    batch: int = 64
    steps: int = 1000
    pool: int = 20000
    ema: float = 0.999
    seed: int = 0
    deepen: bool = False  # whether the text encoders get one more layer
    save_every: int = 1000
    look_every: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "pool"):
            if getattr(self, name) < 1:
                raise ValueError(f"Stage({name}={getattr(self, name)}): must be at least 1")


def draw_dataset(stage: PretrainingStage) -> dataset.MiniDataset:
    """The stage's own, drawn by as many processes as torch has threads."""
    say = Progress("drawing scenes", stage.pool)
    return dataset.make_dataset(stage.pool, stage.seed, WORLDS[stage.world], say, workers=torch.get_num_threads())


@torch.no_grad()
def _measure_latents(vae: Any, pixels: Tensor, video: bool) -> None:
    """Tell the codec's config what makes latents have mean 0 and standard deviation 1 as the pipeline sees them."""
    z = torch.cat([vae.encode(x).latent_dist.mean for x in pixels.split(256)])
    if video:
        mean, std = ([round(v, 4) for v in f((0, 2, 3, 4)).tolist()] for f in (z.mean, z.std))
        vae.register_to_config(latents_mean=mean, latents_std=std)
    else:
        vae.register_to_config(shift_factor=round(z.mean().item(), 4), scaling_factor=round(1 / z.std().item(), 4))


def train_autoencoder(stage: PretrainingStage, folder: Path, vae: Any) -> Any:
    """Train a codec in place and return its average, latents normalised by its config."""
    pool, video = draw_dataset(stage), stage.model == "qwen-autoencoder"

    def images(i: Tensor) -> Tensor:
        return pool.pixels(i)[:, :, None] if video else pool.pixels(i)  # a video codec sees an image as one frame

    if video:
        use_2d_convs(vae)
    vae.to(torch.get_default_device())
    learner = Learner("vae", vae, vae, {"main": (stage.optim, [(vae.parameters(), 1.0)])}, ema=stage.ema)

    def deal(step: int) -> tuple[Batch, list[int]]:
        i, ids = sample_indices(len(pool.prompts), stage.batch, stage.seed, step)
        return Batch(None, images(i)), ids

    vae.train()
    trainer.train(
        stage.algorithm,
        PretrainingModels(learner),
        on_default_device(deal),
        folder,
        seed=stage.seed,
        steps=stage.steps,
        save_every=stage.save_every,
        show=("vae/loss",),
        label=stage.model,
    )
    vae.load_state_dict(learner.averaged())
    vae.cpu().eval()
    _measure_latents(vae, images(torch.arange(min(2048, stage.pool), device="cpu")), video)
    write_folder(folder / "vae", vae.save_pretrained)
    return vae


class TransformerAndTextEncoders(torch.nn.Module):
    """The networks that flow matching trains together: the transformer and its text encoders."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.transformer = backbone.net
        self.encoders = torch.nn.ModuleList(backbone.encoders)


def train_flow(stage: PretrainingStage, folder: Path, pipe: Any, look: Callable[[Backbone, int], object]) -> Any:
    """Train transformer and text encoders of a pipeline in place; leaves their averages in it and saves it."""
    backbone = backbone_from_pipeline(pipe, METADATA)
    net = TransformerAndTextEncoders(backbone).to(torch.get_default_device())
    backbone.vae.to(torch.get_default_device())
    with torch.device("cpu"):
        pool = draw_dataset(stage)
        latents = dataset.encode_dataset(backbone, pool, Progress("encoding images", stage.pool))[:, 0]
        *ids, null = backbone.tokenize([*pool.prompts, ""])  # together, so that all have one length
        ids = torch.stack(ids)
    null = to_default_device(null)

    def call(x: Tensor, t: Tensor, cond: Tensor, keep: Tensor) -> Tensor:
        return backbone.velocity(backbone.net, x, t, backbone.embed(torch.where(keep[:, None, None], cond, null)))

    def deal(step: int) -> tuple[Batch, list[int]]:
        i, samples = sample_indices(stage.pool, stage.batch, stage.seed, step)
        return Batch(ids[i], latents[i]), samples

    learner = Learner("flow", net, call, {"main": (stage.optim, [(net.parameters(), 1.0)])}, ema=stage.ema)

    def look_averaged(step: int) -> None:
        with learner.averaging():
            look(backbone, step)

    net.train()
    trainer.train(
        stage.algorithm,
        PretrainingModels(learner),
        on_default_device(deal),
        folder,
        seed=stage.seed,
        steps=stage.steps,
        save_every=stage.save_every,
        look_every=stage.look_every,
        look=look_averaged,
        show=("flow/loss",),
        label=stage.model,
    )
    net.load_state_dict(learner.averaged())
    net.cpu().eval()
    backbone.vae.cpu()
    note = {"name": stage.model, "sampling": {"steps": 40, "guidance": GUIDANCE}, **METADATA}
    write_folder(folder / "pipeline", lambda p: save_pipeline(pipe, p, note))
    return pipe
