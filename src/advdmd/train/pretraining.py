"""The stages that make the miniature teachers, each a resumable run in its own folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from advdmd.algorithms.pretrain import Autoencode, FlowMatch, Pupil
from advdmd.data import shapes
from advdmd.data.deal import at_home, take
from advdmd.files import write_folder
from advdmd.models import mini
from advdmd.models.backbone import Backbone
from advdmd.models.load import as_backbone, save_pipeline
from advdmd.models.qwen_image import see_images
from advdmd.rng import home
from advdmd.train import loop
from advdmd.train.book import Progress
from advdmd.train.learner import Learner, Optim
from advdmd.types import Batch
from advdmd.world.scene import WORLDS

MINIATURE = {"t5_length": 0, "side": mini.LATENT}  # what a backbone must know beside the pipeline
GUIDANCE = 5.0  # the teachers' best guidance scale at 40 steps (docs/log.md)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of pre-training on the miniature world."""

    model: Literal["autoencoder", "mini-sd3", "mini-sd35", "qwen-autoencoder", "mini-qwen"]
    origin: Literal["nothing", "autoencoder", "mini-sd35", "qwen-autoencoder", "mini-qwen"] = "nothing"  # what it goes on from
    algorithm: Autoencode | FlowMatch
    optim: Optim
    size: mini.Size = mini.Size()
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


def scenes(stage: Stage) -> shapes.Pool:
    """The stage's own, drawn by as many processes as torch has threads."""
    say = Progress("drawing scenes", stage.pool)
    return shapes.make_pool(stage.pool, stage.seed, WORLDS[stage.world], say, workers=torch.get_num_threads())


@torch.no_grad()
def _measure_latents(vae: Any, pixels: Tensor, video: bool) -> None:
    """Tell the codec's config what makes latents have mean 0 and standard deviation 1 as the pipeline sees them."""
    z = torch.cat([vae.encode(x).latent_dist.mean for x in pixels.split(256)])
    if video:
        mean, std = ([round(v, 4) for v in f((0, 2, 3, 4)).tolist()] for f in (z.mean, z.std))
        vae.register_to_config(latents_mean=mean, latents_std=std)
    else:
        vae.register_to_config(shift_factor=round(z.mean().item(), 4), scaling_factor=round(1 / z.std().item(), 4))


def train_autoencoder(stage: Stage, folder: Path, vae: Any) -> Any:
    """Train a codec in place and return its average, latents normalised by its config."""
    pool, video = scenes(stage), stage.model == "qwen-autoencoder"

    def images(i: Tensor) -> Tensor:
        return pool.pixels(i)[:, :, None] if video else pool.pixels(i)  # a video codec sees an image as one frame

    if video:
        see_images(vae)
    vae.to(torch.get_default_device())
    learner = Learner("vae", vae, vae, {"main": (stage.optim, [(vae.parameters(), 1.0)])}, ema=stage.ema)

    def deal(step: int) -> tuple[Batch, list[int]]:
        i, ids = take(len(pool.prompts), stage.batch, stage.seed, step)
        return Batch(None, images(i)), ids

    vae.train()
    loop.run(
        stage.algorithm,
        Pupil(learner),
        at_home(deal),
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


class Captioned(torch.nn.Module):
    """The networks that flow matching trains together: the transformer and its text encoders."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.transformer = backbone.net
        self.encoders = torch.nn.ModuleList(backbone.encoders)


def train_flow(stage: Stage, folder: Path, pipe: Any, look: Callable[[Backbone, int], object]) -> Any:
    """Train transformer and text encoders of a pipeline in place; leaves their averages in it and saves it."""
    backbone = as_backbone(pipe, MINIATURE)
    net = Captioned(backbone).to(torch.get_default_device())
    backbone.vae.to(torch.get_default_device())
    with torch.device("cpu"):
        pool = scenes(stage)
        latents = shapes.encode(backbone, pool, Progress("encoding images", stage.pool))[:, 0]
        *ids, null = backbone.tokenize([*pool.prompts, ""])  # together, so that all have one length
        ids = torch.stack(ids)
    null = home(null)

    def call(x: Tensor, t: Tensor, cond: Tensor, keep: Tensor) -> Tensor:
        return backbone.velocity(backbone.net, x, t, backbone.embed(torch.where(keep[:, None, None], cond, null)))

    def deal(step: int) -> tuple[Batch, list[int]]:
        i, samples = take(stage.pool, stage.batch, stage.seed, step)
        return Batch(ids[i], latents[i]), samples

    learner = Learner("flow", net, call, {"main": (stage.optim, [(net.parameters(), 1.0)])}, ema=stage.ema)

    def look_averaged(step: int) -> None:
        with learner.averaging():
            look(backbone, step)

    net.train()
    loop.run(
        stage.algorithm,
        Pupil(learner),
        at_home(deal),
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
    note = {"name": stage.model, "sampling": {"steps": 40, "guidance": GUIDANCE}, **MINIATURE}
    write_folder(folder / "pipeline", lambda p: save_pipeline(pipe, p, note))
    return pipe
