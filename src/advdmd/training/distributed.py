"""Several processes, started by torchrun: ranks, values that all ranks agree on, sums over ranks, sharded networks.

The only file that knows torch.distributed. One process needs no process group and pays nothing. Each rank has a replica of
every network, or its shards of those that `fully_shard_` has sharded (FSDP2). Shards are DTensors, all else are plain tensors.
"""

# torch and safetensors leave these types open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

import os
import socket
import subprocess
import tempfile
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from advdmd.files import file_hash, folder_hash
from advdmd.types import ONE_RANK, Metrics, Ranks

READY = "ADVDMD_READY"  # variable: the pipe on which a process of local_processes says that it has begun
BUCKET = 2**23  # numbers of gradients that are exchanged at once: 32 MB
TIMEOUT = timedelta(minutes=30)  # how long ranks wait while the first saves samples, a few minutes, or validates


def rank_and_world_size() -> tuple[int, int]:
    """Which of how many processes torchrun started this one is; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def local_processes(n: int, command: Sequence[str]) -> Generator[None, None, None]:
    """Inside, this process is the first of n on this machine. The others run `command`, and end when the context does.

    They find each other as processes that torchrun starts do, so `command` must do the same work as the caller. Raises
    ValueError if one of them ends before `init_distributed`.
    """
    if n == 1:
        yield
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own, others, pipes = dict(os.environ), list[subprocess.Popen[bytes]](), list[int]()
    with tempfile.TemporaryFile() as errors:  # the first process says what both find
        try:
            for rank in range(1, n):
                ready, says_ready = os.pipe()
                env = own | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), READY: str(says_ready)}
                others.append(
                    subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=env, pass_fds=[says_ready])
                )
                os.close(says_ready)
                pipes.append(ready)
            for rank, ready in enumerate(pipes, 1):
                if not os.read(ready, 1):
                    status = others[rank - 1].wait()
                    errors.seek(0)
                    text = errors.read().decode(errors="replace").strip()
                    raise ValueError(f"process {rank} of {n} ended with status {status} before it had begun: {text[-1000:]}")
            os.environ.update(shared | {"RANK": "0", "LOCAL_RANK": "0"})
            yield
        finally:
            os.environ.clear()
            os.environ.update(own)
            for other in others:
                other.kill()
                other.wait()
            for ready in pipes:
                os.close(ready)


def num_nodes() -> int:
    """On how many machines torchrun's processes are, all with as many as this one."""
    size = rank_and_world_size()[1]
    return size // int(os.environ.get("LOCAL_WORLD_SIZE", size))


def local_device(device: str) -> str:
    """This rank's GPU, where torchrun started one process for each."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


@contextmanager
def init_distributed(device: str = "cpu") -> Generator[Ranks, None, None]:
    """The ranks that torchrun started, or this process alone. Raises ValueError on the others if a process dies."""
    if rank_and_world_size()[1] == 1:
        yield ONE_RANK
        return
    if READY in os.environ:
        os.write(int(os.environ[READY]), b"1")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), gather=_gather)
    except RuntimeError as e:
        if any(text in str(e) for text in ("Connection closed by peer", "Connection reset", "NCCL", "gloo")):
            raise ValueError(
                f"process {dist.get_rank()} of {dist.get_world_size()}: another process is gone, or has let this one wait for "
                f"{TIMEOUT.seconds // 60} minutes; the last checkpoint is kept"
            ) from e
        raise
    finally:
        dist.destroy_process_group()


def widest_float(device: torch.device) -> torch.dtype:
    """The type of sums over many numbers: float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


def _device() -> torch.device:
    """Where tensors must be to be exchanged."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _gather(x: Tensor) -> Tensor:
    """[..., n] of every rank -> [..., world_size n], in order of rank."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, -1)


def _gather_number(number: float) -> Tensor:
    """A number of every rank, [world_size]."""
    return _gather(torch.tensor([float(number)], device=_device()))


def _mesh(device: str, hybrid: bool) -> DeviceMesh:
    """All ranks in a row or, if `hybrid`, a row for each node: what a row's ranks shard, the rows replicate."""
    from torch.distributed.device_mesh import init_device_mesh

    size = dist.get_world_size()
    each = int(os.environ.get("LOCAL_WORLD_SIZE", size)) if hybrid else size
    if size % each:
        raise ValueError(f"fsdp_sharding=hybrid: {size} processes are not the same number on every node ({each} on this one)")
    if each == size:
        return init_device_mesh(device, (size,))
    return init_device_mesh(device, (size // each, each), mesh_dim_names=("replicate", "shard"))


def fully_shard_(net: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype, device: str, hybrid: bool = False) -> None:
    """Shard a network's parameters over all ranks' devices or, if `hybrid`, over those of a node, in place (FSDP2).

    Nodes then hold replicas, so that gradients alone cross the network between them. A block at a time is gathered for a pass,
    in `dtype`, and freed after it. Gradients arrive as sums over ranks, in float32. Every rank must make as many passes. Inputs
    keep their type: a rounded time would be another time. Raises ValueError if the nodes have other numbers of ranks.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = _mesh(device, hybrid)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*blocks, net):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def is_sharded(x: Tensor) -> bool:
    """Whether a tensor of any shape is sharded over ranks."""
    return isinstance(x, DTensor)


def local_shard(x: Tensor) -> Tensor:
    """This rank's shard of a tensor of any shape, or all of a plain one; changes in place are changes of the tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def full_tensor(x: Tensor) -> Tensor:
    """All of a tensor of any shape, on every rank. All ranks must call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def distribute_like(x: Tensor, like: Tensor) -> Tensor:
    """A plain tensor sharded as `like`, of the same shape, is.

    What is sharded already stays as it is, and so does all else where `like` is plain.
    """
    if isinstance(like, DTensor) and not isinstance(x, DTensor):
        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)
    return x


def all_reduce_sum(values: Tensor, of: Sequence[Tensor]) -> Tensor:
    """Sums over this rank's shards, values [...], made sums over all shards, in place, if any of the tensors `of` is sharded.

    Same shape. Replicas of a shard count once.
    """
    mesh = next((x.device_mesh for x in of if isinstance(x, DTensor)), None)
    if mesh is not None:
        dist.all_reduce(values, group=mesh.get_group(mesh.ndim - 1))
    return values


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The norm [] of all gradients [...] together, of sharded ones and of replicas, on their device."""
    shards = [g for g in grads if is_sharded(g)]
    if not shards:
        return torch.nn.utils.get_total_norm(grads)
    squares = all_reduce_sum(torch.stack([local_shard(g).double().square().sum() for g in shards]).sum(), shards)
    plain = [g.double().square().sum() for g in grads if not is_sharded(g)]  # shards are never on Apple's GPUs
    return torch.stack([squares, *plain]).sum().sqrt()


def save_sharded(tensors: Mapping[str, Tensor], folder: Path) -> str:
    """Every rank writes its shards of tensors [...] into `folder`, as safetensors (torch.distributed.checkpoint).

    Returns `sharded_hash`.

    Raises OSError if any rank cannot write.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    try:
        dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except dcp.CheckpointException as e:
        raise OSError(f"{folder} cannot be written ({e}): make room there and run the same command again") from None
    barrier()
    hashes = _file_hashes(folder)
    if "" in hashes.values():
        raise OSError(f"{folder} cannot be read again: check the disk and run the same command again")
    return folder_hash(hashes)


def sharded_hash(folder: Path) -> str:
    """files.file_hash of a folder of shards, of which each rank reads a part. All ranks must call this."""
    return folder_hash(_file_hashes(folder)) if dist.is_initialized() else file_hash(folder)


def _file_hashes(folder: Path) -> dict[str, str]:
    """The hashes of a folder's files, of which each rank reads a part.

    "" of what cannot be read, as all ranks must exchange them.
    """
    files, size = sorted(f for f in folder.iterdir() if f.is_file()), dist.get_world_size()
    own = dict.fromkeys((f.name for f in files[dist.get_rank() :: size]), "")
    for name in own:
        with suppress(OSError):
            own[name] = file_hash(folder / name)
    hashes: list[dict[str, str]] = [{} for _ in range(size)]
    dist.all_gather_object(hashes, own)
    return {k: v for part in hashes for k, v in part.items()}


def load_sharded(folder: Path, template: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `save_sharded` wrote, by however many ranks, sharded as the tensors [...] of the same names in `template` are now.

    Raises ValueError if the folder holds a name that `template` lacks.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    names = reader.read_metadata().state_dict_metadata
    if strange := sorted(set(names) - set(template)):
        raise ValueError(f"{folder}: the checkpoint holds {strange[0]}, which this recipe does not have")
    out = {name: torch.zeros_like(template[name]) for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads the shards of many: meant
        dcp.load(out, storage_reader=reader, no_dist=not dist.is_initialized())
    return out


def all_reduce_gradients(params: Sequence[nn.Parameter], total: Tensor, count: int) -> tuple[Tensor, int]:
    """Sums of a total [] and of a count over all ranks; all gradients of replicas are summed too, in place, BUCKET at a time.

    A gradient that one rank lacks (it had no sample of a minibatch) counts as zero; one that all ranks lack stays absent.
    """
    if not dist.is_initialized():
        return total, count
    params = [p for p in params if not is_sharded(p)]  # the others' are sums already
    has = torch.tensor([count, *(p.grad is not None for p in params)], dtype=total.dtype, device=total.device)
    has = torch.cat([total[None], has])
    dist.all_reduce(has)
    count, *used = has[1:].tolist()
    for bucket in _buckets([p for p, n in zip(params, used, strict=True) if n > 0]):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for p, g, summed in zip(bucket, grads, flat.split([g.numel() for g in grads]), strict=True):
            p.grad = g.copy_(summed.view_as(g))
    return has[0], int(count)


def _buckets(params: Sequence[nn.Parameter]) -> Generator[list[nn.Parameter], None, None]:
    """Parameters in order, in groups of at most BUCKET numbers, or of one."""
    group, size = list[nn.Parameter](), 0
    for p in params:
        if group and size + p.numel() > BUCKET:
            yield group
            group, size = [], 0
        group, size = [*group, p], size + p.numel()
    if group:
        yield group


def mean_over_ranks(metrics: Metrics) -> Metrics:
    """Each number's mean over all ranks, which log the same keys: what happens depends on the iteration alone."""
    if not dist.is_initialized():
        return metrics
    every = _gather(torch.tensor([list(metrics.values())], dtype=torch.float64, device=_device()).T)
    return dict(zip(metrics, every.mean(1).tolist(), strict=True))


def check_same_on_all_ranks(number: int, what: str) -> None:
    """Raises ValueError, on all ranks, if they do not have the same number."""
    if dist.is_initialized() and (every := _gather_number(number)).ne(number).any():
        raise ValueError(f"the processes found different {what} ({every.tolist()}): all processes must use one shared folder")


def is_main_process() -> bool:
    """Whether this is rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank. All ranks must call this."""
    return bool(_gather_number(flag).any()) if dist.is_initialized() else flag


def barrier() -> None:
    """Wait until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def main_process_first() -> Generator[None, None, None]:
    """The main process goes through the inside before the others do, and leaves there what they find."""
    if not is_main_process():
        barrier()
    yield
    if is_main_process():
        barrier()
