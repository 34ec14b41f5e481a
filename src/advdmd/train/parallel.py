"""Several processes with a replica each, started by torchrun: who is who, what all of them computed, and sums over them.

The only file that knows torch.distributed. One process needs no process group and pays nothing.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from advdmd.rng import home
from advdmd.types import ALONE, Log, Team

PATIENCE = timedelta(minutes=30)  # how long the others wait while one draws pictures or sits an exam


@contextmanager
def processes(device: str = "cpu") -> Iterator[Team]:
    """The processes that torchrun started, or this one alone. A process that dies ends the others with a message."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Team(rank=dist.get_rank(), size=size, gather=_gather)
    except RuntimeError as e:
        if any(said in str(e) for said in ("Connection closed by peer", "Connection reset", "NCCL", "gloo")):
            raise ValueError(
                f"process {dist.get_rank()} of {size}: another process is gone; the last checkpoint is kept"
            ) from e
        raise
    finally:
        dist.destroy_process_group()


def _gather(x: Tensor) -> Tensor:
    """[..., n] of every process -> [..., size n], in order of rank."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, -1)


def add_up(params: Sequence[nn.Parameter], *numbers: float) -> list[float]:
    """Sum gradients in place, and numbers, over all processes in one exchange. A gradient that one process lacks (none of a
    minibatch's samples were its own) counts as zero; one that all lack stays absent."""
    if not dist.is_initialized():
        return list(numbers)
    device, dtype = params[0].device, torch.float64
    has = torch.tensor([float(p.grad is not None) for p in params] + list(numbers), dtype=dtype, device=device)
    dist.all_reduce(has)
    moved = [p for p, n in zip(params, has, strict=False) if n > 0]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in moved])
    dist.all_reduce(flat)
    for p, g in zip(moved, flat.split([p.numel() for p in moved]), strict=True):
        p.grad = g.view_as(p).clone()
    return has[len(params) :].tolist()


def mean(log: Log) -> Log:
    """Each number's mean over all processes, which log the same ones: what happens depends on the step alone."""
    if not dist.is_initialized():
        return log
    every = _gather(home(torch.tensor([list(log.values())], dtype=torch.float64).T))
    return dict(zip(log, every.mean(1).tolist(), strict=True))


def any_of(mine: bool) -> bool:
    """Whether it is so for any process."""
    if not dist.is_initialized():
        return mine
    return bool(_gather(home(torch.tensor([float(mine)]))).any())


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()
