"""One iteration that is tried and undone: whether it fits into the device's memory."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from advdmd.rng import Rng
from advdmd.training.learner import Learner
from advdmd.training.trainer import TakesTrainSteps
from advdmd.types import Columns


def fits(
    algorithm: TakesTrainSteps,
    models: NamedTuple,
    batch: Columns,
    iteration: int,
    rng: Rng,
    extra_state: Mapping[str, Tensor],
) -> bool:
    """Whether a train step on a batch [N] ends without running out of memory; all is as before afterwards.

    extra_state: tensors [...] of the run's state that a step changes in place. Networks must not be sharded: their state is
    copied to the CPU for that time.
    """
    learners = [m for m in models if isinstance(m, Learner)]
    kept = [learner.state_dict() for learner in learners]
    copies = [({k: v.to("cpu", copy=True) for k, v in tensors.items()}, counters) for tensors, counters in kept]
    extra = {k: v.clone() for k, v in extra_state.items()}
    del kept
    try:
        algorithm.train_step(models, batch, iteration, rng)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        for learner, (tensors, counters) in zip(learners, copies, strict=True):
            learner.load_state_dict(tensors, counters)
        for k, v in extra_state.items():
            v.copy_(extra[k])
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
