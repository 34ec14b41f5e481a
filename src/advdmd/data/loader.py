"""Which prompts and images a step takes: a function of the step alone, shared out over processes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from advdmd.rng import generator
from advdmd.types import ONE_RANK, Batch, Cond, Ranks

BatchFn = Callable[[int], tuple[Batch, list[int]]]


def sample_indices(n_pool: int, n: int, seed: int, step: int) -> tuple[Tensor, list[int]]:
    """Which n pool entries step takes (without repeats within an epoch), and the samples' ids. Pure in its arguments."""
    ids = range(step * n, step * n + n)
    epochs = {i // n_pool for i in ids}
    orders = {k: torch.randperm(n_pool, generator=generator(seed, "epoch", k)) for k in epochs}
    return torch.stack([orders[i // n_pool][i % n_pool] for i in ids]), list(ids)


def on_default_device(deal: BatchFn) -> BatchFn:
    """Its batches where tensors are made by default; data, text encoders and autoencoder live on the CPU."""

    def moved(step: int) -> tuple[Batch, list[int]]:
        with torch.device("cpu"):
            batch, samples = deal(step)
        return batch.to(torch.get_default_device()), samples

    return moved


def make_batch_fn(
    n: int,
    prompts: int,
    group: int,
    seed: int,
    cond: Callable[[Sequence[int]], Cond],
    real: Callable[[int, int], Tensor],
    team: Ranks = ONE_RANK,
    few: bool = False,
) -> BatchFn:
    """step -> groups of one prompt each with real latents of the same prompt, other images every epoch, and the samples' ids.

    Of n prompts a step takes `prompts`, of which this process gets its share. cond(i) are the conditions of prompts i, real(p,
    k) the k-th image of prompt p, counted round. Raises ValueError if there are too few prompts, unless `few` may come twice.
    """
    if n < prompts and not few:
        raise ValueError(f"the data hold {n} prompts, an iteration takes prompts_per_step={prompts}")

    def deal(step: int) -> tuple[Batch, list[int]]:
        every, order = sample_indices(n, prompts, seed, step)
        here = team.share(prompts)
        mine, turns = every[here.start : here.stop].tolist(), order[here.start : here.stop]
        # The prompt before mine belongs to another process; alone, a batch holds it itself.
        before = [int(every[here.start - 1])] if team.size > 1 else []
        said, member = cond([*before, *mine]), torch.arange(len(mine)).repeat_interleave(group) + len(before)
        reals = torch.stack([real(p, g + k // n) for p, k in zip(mine, turns, strict=True) for g in range(group)])
        other = said[member - 1] if before else None
        return Batch(said[member], reals, torch.tensor(mine).repeat_interleave(group), other), [
            k * group + g for k in turns for g in range(group)
        ]

    return deal


class TrainingData(NamedTuple):
    """What a run needs from its data: `deal` is pure in the step; `look` are conditions to draw while training."""

    deal: BatchFn
    prompts: Sequence[str]
    null: Cond
    look: Cond
