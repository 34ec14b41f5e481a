"""algorithm.micro_batch_size=auto as a number: as many samples a pass as the GPU holds."""

import sys
from dataclasses import replace
from typing import Any

import torch

from advdmd.data.loader import BatchFn
from advdmd.distillation import memory
from advdmd.models.backbone import Backbone
from advdmd.recipes.recipe import Recipe
from advdmd.rng import Rng
from advdmd.training.dry_run import fits
from advdmd.types import Ranks

FILL = 0.88  # of a GPU's memory by the estimate, whose error was below 12 %


def with_micro_batch(r: Recipe, samples: int) -> Recipe:
    """The recipe with `samples` a pass."""
    return replace(r, algorithm=r.algorithm.with_samples_per_pass(samples))


def fitted(r: Recipe, resolution: int | None, gpus: int, gpu_memory: float | None, source_images: int = 1) -> Recipe:
    """A recipe whose micro_batch_size is a number: the largest share of an iteration's samples that fills a GPU to FILL.

    resolution: side of the images in pixels, None for the miniature's. gpu_memory in GB; None on a CPU. source_images: of a
    prompt, at most. All samples of a process go in one pass on a CPU, for the miniature, and where the transformer's memory is
    not known.
    """
    if not r.algorithm.fits_passes_to_gpu:
        return r
    samples = max(1, r.batch // gpus)
    if gpu_memory is None or resolution is None:
        return with_micro_batch(r, samples)
    passes = 1
    while passes < samples:
        tried = with_micro_batch(r, -(-samples // passes))
        try:
            if memory.estimate(tried, resolution, gpus, source_images=source_images).total <= FILL * gpu_memory * memory.GB:
                return tried
        except ValueError:  # a class of transformer whose memory is not known
            return with_micro_batch(r, samples)
        passes += 1
    return with_micro_batch(r, 1)


def proven(r: Recipe, backbone: Backbone, models: Any, batch_fn: BatchFn, ranks: Ranks) -> Recipe:
    """The recipe after an iteration with all kinds of updates was tried: half the samples a pass as often as memory ran out.

    Says so on stderr. All ranks take the same number. Networks that are sharded are not tried.
    """
    full = r.full_iteration
    batch, samples = batch_fn(full)
    following, batch = batch.to(backbone.device), batch.to(backbone.device)  # as the next one is there while one runs
    while True:
        algorithm, now = r.algorithm, r.algorithm.samples_per_pass(r.batch)
        rng = Rng(r.seed, full, samples, ranks, backbone.device)
        enough = fits(algorithm, models, batch, full, rng, algorithm.extra_state(models))
        if ranks.gather(torch.tensor([float(enough)], device=backbone.device)).min() > 0 or now == 1:
            break
        r = with_micro_batch(r, now // 2)
    del following
    if not ranks.rank:
        print(f"algorithm.micro_batch_size=auto: {now} samples a pass", file=sys.stderr)
    return r
