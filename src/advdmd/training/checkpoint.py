"""Checkpoints: safetensors and a JSON record with their hash, written last. What has no record is no checkpoint.

A checkpoint is a file, or a folder with every rank's shards where networks are sharded. Any number of ranks, sharded or not,
can resume from either.
"""

# torch and safetensors leave these types open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from advdmd.files import file_hash, folder_hash, read_object, write_atomically, write_text
from advdmd.training import distributed
from advdmd.training.learner import Learner
from advdmd.types import ONE_RANK, Json, Ranks

KEEP = 2  # checkpoints kept; the one before the newest survives a damaged newest


def save(
    folder: Path,
    iteration: int,
    learners: Mapping[str, Learner],
    extra_state: Mapping[str, Tensor],
    fingerprint: str = "",
    ranks: Ranks = ONE_RANK,
    data: Json | None = None,
) -> None:
    """Write `folder`/step-N.safetensors and its record, then remove all but the newest KEEP.

    `fingerprint` tells runs apart; data: what the run's data hold, for `check_data`.

    extra_state: tensors [...] beside the learners. All ranks call this. The main process writes; where networks are sharded
    every rank writes its shards.
    """
    from safetensors.torch import save_file

    sharded = any(learner.sharded for learner in learners.values())
    if ranks.rank and not sharded:
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {f"extra/{k}": v for k, v in extra_state.items()}
    counters: Json = {}
    for name, learner in learners.items():
        state, counters[name] = learner.state_dict()
        tensors |= {f"{name}/{k}": v.detach() for k, v in state.items()}
    path = folder / f"step-{iteration:07d}.safetensors"
    if not ranks.rank and path.is_dir():
        shutil.rmtree(path)  # shards that were being written when a run was killed
    if sharded:
        if not ranks.rank:
            path.unlink(missing_ok=True)
        distributed.barrier()
        digest = distributed.save_sharded(tensors, path)
    else:
        cpu = {k: v.to("cpu", copy=True).contiguous() for k, v in tensors.items()}
        write_atomically(path, lambda p: save_file(cpu, p))
        digest = file_hash(path)
    if ranks.rank:
        return
    record = {"step": iteration, "sha256": digest, "run": fingerprint, "data": data, "counters": counters}
    write_text(path.with_suffix(".json"), json.dumps(record))
    for old in sorted(folder.glob("step-*.json"))[:-KEEP]:
        old.unlink()
    for half in folder.glob(".step-*"):  # this process alone writes here: what a killed one left, on whatever machine
        half.unlink()
    for stale in folder.glob("step-*.safetensors"):
        if not stale.with_suffix(".json").exists():
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


def latest(folder: Path, warn: Callable[[str], object] = print) -> tuple[Path, Json] | None:
    """The newest checkpoint whose bytes match its record, and the record. Damaged ones are named and passed over.

    All ranks must call this. Raises ValueError if they do not see the same files.
    """
    distributed.check_same_on_all_ranks(int(folder_hash({p.name: "" for p in folder.glob("step-*")})[:6], 16), "checkpoints")
    for record_file in sorted(folder.glob("step-*.json"), reverse=True):
        path = record_file.with_suffix(".safetensors")
        try:
            record = read_object(record_file, "step", "sha256", "run", "counters", hint="trying the one before")
            if (distributed.sharded_hash(path) if path.is_dir() else file_hash(path)) == record["sha256"]:
                return path, record
            warn(f"checkpoint {path} is damaged (its sha256 differs from its record): trying the one before")
        except ValueError as e:
            warn(f"checkpoint {e}")
        except OSError as e:
            warn(f"checkpoint {path} cannot be read ({e}): trying the one before")
    return None


def newest_step(folder: Path) -> int:
    """After how many iterations the newest checkpoint was written, by the names of files alone; 0 if there is none."""
    return max((int(f.stem[5:]) for f in folder.glob("step-*.json") if f.stem[5:].isdecimal()), default=0)


def check_data(path: Path, then: Json | None, now: Json | None) -> None:
    """Say if a run's data have changed since a checkpoint, as by an image more.

    Raises ValueError if they hold less than half of the prompts that they held then, as far as their sketches tell.
    """
    if then is None or now is None or then["content"] == now["content"]:
        return
    whole = len(now["sketch"]) == now["prompts"]  # else it ends at its largest hash
    known = [h for h in then["sketch"] if whole or h <= now["sketch"][-1]]
    if 2 * sum(h in now["sketch"] for h in known) < len(known):
        raise ValueError(
            f"{path}: the run's data held {then['prompts']} prompts, now they are others ({now['prompts']}): choose another "
            "--out, or name the cache of this run"
        )
    if distributed.is_main_process():
        print(
            f"the data have changed since {path.stem}: {then['prompts']} prompts then, {now['prompts']} now; the run goes on "
            "with them, in another order",
            file=sys.stderr,
        )


def resume(
    folder: Path,
    learners: Mapping[str, Learner],
    extra_state: Mapping[str, Tensor],
    fingerprint: str | None = None,
    data: Json | None = None,
) -> int:
    """Load the newest good checkpoint into the learners and the tensors [...] of `extra_state`, in place.

    Returns its iteration (0: none).

    Raises ValueError if there are checkpoints but none is good, or if they are of another run or of other data.
    """
    from safetensors.torch import load_file

    found = latest(folder)
    distributed.check_same_on_all_ranks(found[1]["step"] if found else 0, "checkpoints")
    if found is None:
        if any(folder.glob("step-*.json")):  # tensors without a record were being written when the run was killed
            raise ValueError(f"{folder}: every checkpoint is damaged; remove the folder to start again")
        return 0
    path, record = found
    if fingerprint is not None and record["run"] != fingerprint:
        raise ValueError(
            f"{path} is a checkpoint of another recipe, or of a cache of other encoders: keep that, or use another folder"
        )
    check_data(path, record.get("data"), data)
    if set(record["counters"]) != set(learners):
        raise ValueError(
            f"{path}: holds {sorted(record['counters'])}, this run needs {sorted(learners)}; a checkpoint of an earlier "
            "version cannot be read: run again into another --out"
        )
    if path.is_dir():
        template = {f"{name}/{k}": v for name, learner in learners.items() for k, v in learner.state_template().items()}
        tensors = distributed.load_sharded(path, template | {f"extra/{k}": v for k, v in extra_state.items()})
    else:
        tensors = load_file(path)
    for name, learner in learners.items():
        part = {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}
        learner.load_state_dict(part, record["counters"][name])
    for k, v in extra_state.items():
        v.copy_(tensors[f"extra/{k}"])
    return record["step"]
