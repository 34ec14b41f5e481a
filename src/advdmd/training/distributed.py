"""Several processes, started by torchrun: who is who, what all of them computed, sums over them, networks spread over them.

The only file that knows torch.distributed. One process needs no process group and pays nothing. Each process has a replica of
every network, or its share of those that `shard` has spread (FSDP2); the shares are DTensors, all else are plain tensors.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from advdmd.files import file_hash, folder_hash
from advdmd.rng import to_default_device
from advdmd.types import ONE_RANK, Metrics, Ranks

TIMEOUT = timedelta(minutes=30)  # how long the others wait while one draws pictures, a few minutes, or sits an exam


def rank_and_world_size() -> tuple[int, int]:
    """Which of how many processes torchrun started this one is; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_device(device: str) -> str:
    """This process's card, where torchrun started one for each."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


@contextmanager
def init_distributed(device: str = "cpu") -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone. A process that dies ends the others with a message."""
    if rank_and_world_size()[1] == 1:
        yield ONE_RANK
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(rank=dist.get_rank(), size=dist.get_world_size(), gather=_gather)
    except RuntimeError as e:
        if any(said in str(e) for said in ("Connection closed by peer", "Connection reset", "NCCL", "gloo")):
            raise ValueError(
                f"process {dist.get_rank()} of {dist.get_world_size()}: another process is gone, or has let this one wait for "
                f"{TIMEOUT.seconds // 60} minutes; the last checkpoint is kept"
            ) from e
        raise
    finally:
        dist.destroy_process_group()


def _gather(x: Tensor) -> Tensor:
    """[..., n] of every process -> [..., size n], in order of rank."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, -1)


def fully_shard_(net: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype, device: str) -> None:
    """Spread a network's parameters over all processes' devices, in place: a block at a time is gathered for a pass, in
    `dtype`, and given back behind it. Gradients arrive as sums over the processes, in float32. Every process must make as many
    passes. Inputs stay as they are: a rounded time would be another time."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*blocks, net):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def is_sharded(x: Tensor) -> bool:
    return isinstance(x, DTensor)


def local_shard(x: Any) -> Tensor:
    """This process's share of a tensor, or all of a plain one; changes in place are changes of the tensor."""
    return x.to_local() if is_sharded(x) else x


def full_tensor(x: Any) -> Tensor:
    """All of a tensor, in every process, which must all ask."""
    return x.full_tensor() if is_sharded(x) else x


def distribute_like(x: Tensor, like: Any) -> Tensor:
    """A plain tensor spread as `like` is; what is spread already, and all where `like` is plain, stays as it is."""
    return (
        distribute_tensor(x.to(like.device), like.device_mesh, like.placements) if is_sharded(like) and not is_sharded(x) else x
    )


def all_reduce_sum(shares: Tensor, of: Sequence[Tensor]) -> Tensor:
    """Sums over this process's shares made sums over all of them, if the tensors they are `of` are spread."""
    if any(is_sharded(x) for x in of):
        dist.all_reduce(shares)
    return shares


def grad_norm(grads: Sequence[Tensor]) -> float:
    """The norm of all gradients together, spread ones and replicas."""
    spread_out = [g for g in grads if is_sharded(g)]
    if not spread_out:
        return torch.nn.utils.get_total_norm(grads).item()
    squares = all_reduce_sum(torch.stack([local_shard(g).double().square().sum() for g in spread_out]).sum(), spread_out)
    plain = [g.double().square().sum() for g in grads if not is_sharded(g)]
    return torch.stack([squares, *plain]).sum().sqrt().item()


def save_sharded(tensors: Mapping[str, Tensor], folder: Path) -> str:
    """Every process writes its shares into `folder`, as safetensors (torch.distributed.checkpoint); returns
    `shares_hash`. Raises OSError if any of them cannot."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    try:
        dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except dcp.CheckpointException as e:
        raise OSError(f"{folder} cannot be written ({e}): make room there and run the same command again") from None
    barrier()
    hashes = _file_hashes(folder)
    if "" in hashes.values():
        raise OSError(f"{folder} cannot be read again: look at the disk and run the same command again")
    return folder_hash(hashes)


def sharded_hash(folder: Path) -> str:
    """files.file_hash of a folder of shares, of which each process reads a part; all must ask."""
    return folder_hash(_file_hashes(folder)) if dist.is_initialized() else file_hash(folder)


def _file_hashes(folder: Path) -> dict[str, str]:
    """The hashes of a folder's files, each process's part by itself; "" of what cannot be read, as all must exchange them."""
    files, size = sorted(f for f in folder.iterdir() if f.is_file()), dist.get_world_size()
    mine = dict.fromkeys((f.name for f in files[dist.get_rank() :: size]), "")
    for name in mine:
        with suppress(OSError):
            mine[name] = file_hash(folder / name)
    hashes: list[dict[str, str]] = [{} for _ in range(size)]
    dist.all_gather_object(hashes, mine)
    return {k: v for part in hashes for k, v in part.items()}


def load_sharded(folder: Path, places: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `save_shares` wrote, by however many processes, spread as the tensors of their names in `places` are now."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    names = reader.read_metadata().state_dict_metadata
    if strange := sorted(set(names) - set(places)):
        raise ValueError(f"{folder}: the checkpoint holds what this recipe has no place for: {strange[0]}")
    out = {name: torch.zeros_like(places[name]) for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads the shares of many: meant
        dcp.load(out, storage_reader=reader, no_dist=not dist.is_initialized())
    return out


def all_reduce_gradients(params: Sequence[nn.Parameter], *numbers: float) -> list[float]:
    """Sum numbers over all processes and, in one exchange behind that, all gradients of replicas in place. A gradient that one
    process lacks (none of a minibatch's samples were its own) counts as zero; one that all lack stays absent."""
    if not dist.is_initialized():
        return list(numbers)
    device, dtype = params[0].device, torch.float64
    params = [p for p in params if not is_sharded(p)]  # the others' are sums already
    has = torch.tensor([float(p.grad is not None) for p in params] + list(numbers), dtype=dtype, device=device)
    dist.all_reduce(has)
    moved = [p for p, n in zip(params, has, strict=False) if n > 0]
    if moved:
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in moved])
        dist.all_reduce(flat)
        for p, g in zip(moved, flat.split([p.numel() for p in moved]), strict=True):
            p.grad = g.view_as(p).clone()
    return has[len(params) :].tolist()


def mean_over_ranks(log: Metrics) -> Metrics:
    """Each number's mean over all processes, which log the same ones: what happens depends on the step alone."""
    if not dist.is_initialized():
        return log
    every = _gather(to_default_device(torch.tensor([list(log.values())], dtype=torch.float64).T))
    return dict(zip(log, every.mean(1).tolist(), strict=True))


def check_same_on_all_ranks(number: int, what: str) -> int:
    """A number that all processes must have alike. Raises ValueError, in all of them, if they have not."""
    if dist.is_initialized():
        every = _gather(to_default_device(torch.tensor([float(number)])))
        if (every != number).any():
            raise ValueError(f"the processes found different {what} ({every.tolist()}): all of them need one disk")
    return number


def is_main_process() -> bool:
    """Whether this is the first process, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def any_rank(mine: bool) -> bool:
    """Whether it is so for any process."""
    if not dist.is_initialized():
        return mine
    return bool(_gather(to_default_device(torch.tensor([float(mine)]))).any())


def barrier() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()
