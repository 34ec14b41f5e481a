"""Which prompts and images a step takes: a pure function of the step, shared over ranks.

And what a recipe's data must offer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from advdmd.models.backbone import Backbone
from advdmd.models.images import ImageSampler
from advdmd.rng import generator
from advdmd.types import ONE_RANK, Batch, Cond, Json, Metrics, Ranks

BatchFn = Callable[[int], tuple[Batch, list[int]]]  # step -> (this rank's batch, ids of its samples); pure
Validation = Callable[[ImageSampler], Metrics]  # scores of a model by name; "score" is the one that selects checkpoints


class TrainingData(NamedTuple):
    """What a run needs of its data: batches, all prompts, the empty prompt [1], and conditions [n] for sample grids."""

    batch_fn: BatchFn
    prompts: Sequence[str]
    null: Cond
    sample_cond: Cond


@dataclass(frozen=True)
class BatchConfig:
    """A step's samples: `prompts` prompts, `group_size` samples of each, shared over ranks; the seed of their order."""

    prompts: int
    group_size: int
    seed: int
    ranks: Ranks = ONE_RANK


class DataSource(Protocol):
    """Opened training data: what they need of the teacher, and the batches."""

    resolution: int | None  # side of the images in pixels; None: the teacher's own
    needs_encoders: bool  # whether prompts are encoded while training
    source_images: int  # of a prompt, at most; 0 for models that edit no images
    plan: object  # how the data were made, for the run's fingerprint; None: the recipe says so
    contents: Json | None  # a hash "content" of the data themselves, their number of "prompts" and a "sketch" of the prompts
    warning: str  # printed when training starts, unless empty

    def load(self, backbone: Backbone, config: BatchConfig) -> TrainingData:
        """The batches. Raises ValueError if the data are not for this teacher."""
        ...

    def validation(self, images: int) -> Validation | None:
        """Scores while training, on about so many images per task; None where the data have none."""
        ...


class DataConfig(Protocol):
    """The part of a recipe that says what a run trains on: a frozen dataclass."""

    @property
    def has_validation(self) -> bool:
        """Whether there are scores while training."""
        ...

    def open(self, teacher: str) -> DataSource:
        """Raises ValueError, before a network is loaded, if the data are missing, damaged or not for this teacher."""
        ...


def sample_indices(n: int, k: int, seed: int, step: int) -> tuple[Tensor, list[int]]:
    """Which k of n entries a step takes [k], without repeats within an epoch, and the ids of the samples.

    Pure in its arguments.
    """
    ids = range(step * k, step * k + k)
    epochs = {i // n for i in ids}
    orders = {e: torch.randperm(n, generator=generator(seed, "epoch", e)) for e in epochs}
    return torch.stack([orders[i // n][i % n] for i in ids]), list(ids)


def make_batch_fn(
    n: int,
    config: BatchConfig,
    cond: Callable[[Sequence[int]], Cond],
    real: Callable[[int, int], Tensor],
) -> BatchFn:
    """The batch function over n prompts, pure in the step.

    A step takes config.prompts of the n prompts, without repeats within an epoch, and config.group_size samples of each; every
    rank gets an equal, contiguous share. cond(indices) -> conditions; real(p, k) -> the k-th latent [C, H, W] of an image of
    prompt p, modulo the number it has, so every epoch shows the next ones. Batches are on the CPU.
    Fewer prompts than a step takes repeat within it, with other images of theirs where they have some.
    """
    group, ranks = config.group_size, config.ranks

    def batch_fn(step: int) -> tuple[Batch, list[int]]:
        every, order = sample_indices(n, config.prompts, config.seed, step)
        share = ranks.local_slice(config.prompts)
        own, positions = every[share.start : share.stop].tolist(), order[share.start : share.stop]
        # The prompt before this rank's first belongs to another rank; a single rank's batch holds it itself.
        before = [int(every[share.start - 1])] if ranks.world_size > 1 else []
        conds, member = cond([*before, *own]), torch.arange(len(own)).repeat_interleave(group) + len(before)
        latents = torch.stack([real(p, g + k // n) for p, k in zip(own, positions, strict=True) for g in range(group)])
        mismatched = conds[member - 1] if before else None
        batch = Batch(conds[member], latents, torch.tensor(own).repeat_interleave(group), mismatched)
        return batch, [k * group + g for k in positions for g in range(group)]

    return batch_fn
