"""A pool of captioned scenes to train on, the same for the same seed, and how a step's batch is dealt from it."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor

from advdmd.mini.world import caption
from advdmd.mini.world.render import render, to_uint8
from advdmd.mini.world.scene import FULL, TASKS, Scene, Spec, World, draw_scene, random_spec, stable_hash
from advdmd.models.backbone import Backbone
from advdmd.types import micro_batches

DENSE = "dense"
HELD_OUT = 5  # one prompt in five of these tasks is kept for evaluation
HELD_OUT_TASKS = ("position", "color_attr", DENSE)


def caption_for(task: str, spec: Spec) -> str:
    """The caption of a spec in its task's style."""
    return caption.dense(spec) if task == DENSE else caption.short(spec)


def held_out(task: str, prompt: str) -> bool:
    """Whether a prompt is for evaluation only. The other four tasks have too few prompts to keep any back."""
    return task in HELD_OUT_TASKS and stable_hash(prompt) % HELD_OUT == 0


def is_validation_prompt(task: str, prompt: str) -> bool:
    """Whether a held-out prompt is for validation while training, and so for no test.

    Only dense prompts are many enough to share.
    """
    return task == DENSE and held_out(task, prompt) and stable_hash(prompt) // HELD_OUT % 2 == 1


@dataclass(frozen=True)
class MiniDataset:
    """n prompts, and R images of each: pixels [n, R, 32, 32, 3] uint8."""

    prompts: tuple[str, ...]
    images: np.ndarray

    def pixels(self, i: Tensor, r: Tensor | int = 0) -> Tensor:
        """[N, 3, 32, 32] in [-1, 1]: image r of prompt i."""
        return torch.from_numpy(self.images[i.numpy(), np.asarray(r)]).permute(0, 3, 1, 2).float() / 127.5 - 1


def _scenes(task: str, rng: np.random.Generator, world: World, each: int) -> tuple[str, list[Scene]]:
    while True:  # a prompt that is held out, or too crowded to place quickly, is passed over
        spec = random_spec(task, rng, world)
        prompt = caption_for(task, spec)
        if world.holds_out(spec) or held_out(task, prompt):
            continue
        try:
            return prompt, [draw_scene(spec, rng, world, attempts=2) for _ in range(each)]
        except ValueError:
            continue


def _some(entries: range, seed: int, world: World, each: int) -> tuple[list[str], np.ndarray]:
    """Those entries of a pool: prompts, and their images [n * each, 32, 32, 3] uint8."""
    prompts, scenes = [], []
    for i in entries:
        task = TASKS[i // 2 % len(TASKS)] if i % 2 else DENSE
        prompt, drawn = _scenes(task, np.random.default_rng([seed, i]), world, each)
        prompts.append(prompt)
        scenes += drawn
    return prompts, to_uint8(render(scenes))


def make_dataset(
    n: int,
    seed: int,
    world: World = FULL,
    progress: Callable[[int], object] | None = None,
    images_per_prompt: int = 1,
    workers: int = 1,
) -> MiniDataset:
    """n training prompts, half of GenEval's six tasks in equal shares, half dense, with `images_per_prompt` images of each.

    The same whatever the number of `workers`, the processes that draw. progress is called with the number of prompts that are
    done. Raises ValueError unless both numbers are at least 1.
    """
    each = images_per_prompt
    if n < 1 or each < 1:
        raise ValueError(f"{n} prompts with {each} images each: both must be at least 1")
    parts, prompts, images = [range(n)[i : i + 256] for i in range(0, n, 256)], [], []
    draw_some = partial(_some, seed=seed, world=world, each=each)
    pool = ProcessPoolExecutor(workers, get_context("spawn")) if min(workers, len(parts)) > 1 else None
    with pool or nullcontext():
        for captions, drawn in (pool.map if pool else map)(draw_some, parts):
            prompts += captions
            images.append(drawn)
            if progress:
                progress(len(prompts))
    return MiniDataset(tuple(prompts), np.concatenate(images).reshape(n, each, *images[0].shape[1:]))


@torch.no_grad()
def encode_dataset(backbone: Backbone, pool: MiniDataset, progress: Callable[[int], object] | None = None) -> Tensor:
    """Latents [n, R, C, h, w] of all R images of n prompts."""
    n, each = pool.images.shape[:2]
    out = []
    for i in micro_batches(n, 128):
        prompts = torch.arange(n)[i]
        pixels = pool.pixels(prompts.repeat_interleave(each), torch.arange(each).repeat(len(prompts)))
        z = backbone.encode(pixels.to(backbone.vae.device)).cpu()
        out.append(z.unflatten(0, (len(prompts), each)))
        if progress:
            progress(i.stop)
    return torch.cat(out)
