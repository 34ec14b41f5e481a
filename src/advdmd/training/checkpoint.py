"""Checkpoints: safetensors plus a JSON record written last and hashed: what has no record is no checkpoint; the newest good one
is found again.

A file, or a folder of every process's shares where networks are spread over processes; either can be gone on with by any
number of processes, spread or not.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from advdmd.files import file_hash, folder_hash, read_object, write_atomically, write_text
from advdmd.training import distributed
from advdmd.training.learner import Learner
from advdmd.types import ONE_RANK, Ranks

KEEP = 2  # checkpoints kept; the one before the newest survives a damaged newest


def save(
    folder: Path,
    step: int,
    players: Mapping[str, Learner],
    extra: Mapping[str, Tensor] | None = None,
    run: str = "",
    team: Ranks = ONE_RANK,
) -> None:
    """Write `folder`/step-N.safetensors and its record, then drop all but the newest KEEP. `run` tells runs apart.

    All processes call this; the first one writes, and every one its shares if there are any.
    """
    from safetensors.torch import save_file

    spread = any(p.sharded for p in players.values())
    if team.rank and not spread:
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {f"extra/{k}": v for k, v in (extra or {}).items()}
    counters: dict[str, Any] = {}
    for name, player in players.items():
        state, counters[name] = player.state()
        tensors |= {f"{name}/{k}": v.detach() for k, v in state.items()}
    path = folder / f"step-{step:07d}.safetensors"
    if not team.rank and path.is_dir():
        shutil.rmtree(path)  # shares that were being written when a run was killed
    if spread:
        if not team.rank:
            path.unlink(missing_ok=True)
        distributed.barrier()
        digest = distributed.save_sharded(tensors, path)
    else:
        own = {k: v.to("cpu", copy=True).contiguous() for k, v in tensors.items()}
        write_atomically(path, lambda p: save_file(own, p))
        digest = file_hash(path)
    if team.rank:
        return
    record = {"step": step, "sha256": digest, "run": run, "counters": counters}
    write_text(path.with_suffix(".json"), json.dumps(record))
    for old in sorted(folder.glob("step-*.json"))[:-KEEP]:
        old.unlink()
    for half in folder.glob(".step-*"):  # this process alone writes here: what a killed one left, on whatever machine
        half.unlink()
    for stale in folder.glob("step-*.safetensors"):
        if not stale.with_suffix(".json").exists():
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


def latest(folder: Path, say: Callable[[str], object] = print) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose bytes match its record; damaged ones are named and passed over. All processes must ask;
    raises ValueError if they do not see the same."""
    distributed.check_same_on_all_ranks(int(folder_hash({p.name: "" for p in folder.glob("step-*")})[:6], 16), "checkpoints")
    for record_file in sorted(folder.glob("step-*.json"), reverse=True):
        path = record_file.with_suffix(".safetensors")
        try:
            record = read_object(record_file, "step", "sha256", "run", "counters", way_out="trying the one before")
            if (distributed.sharded_hash(path) if path.is_dir() else file_hash(path)) == record["sha256"]:
                return path, record
            say(f"checkpoint {path} is damaged (its sha256 differs from its record): trying the one before")
        except ValueError as e:
            say(f"checkpoint {e}")
        except OSError as e:
            say(f"checkpoint {path} cannot be read ({e}): trying the one before")
    return None


def resume(
    folder: Path, players: Mapping[str, Learner], extra: Mapping[str, Tensor] | None = None, run: str | None = None
) -> int:
    """Load the newest good checkpoint into the players and `extra`, in place; returns the step to go on from (0: none).

    Raises ValueError if there are checkpoints but none is good, or if they are of another run.
    """
    from safetensors.torch import load_file

    found = latest(folder)
    distributed.check_same_on_all_ranks(found[1]["step"] if found else 0, "checkpoints")
    if found is None:
        if any(folder.glob("step-*.json")):  # tensors without a record were being written when the run was killed
            raise ValueError(f"{folder}: every checkpoint is damaged; remove the folder to start again")
        return 0
    path, record = found
    if run is not None and record["run"] != run:
        raise ValueError(f"{path} is a checkpoint of another recipe: choose another --out")
    if set(record["counters"]) != set(players):
        raise ValueError(f"{path}: holds {sorted(record['counters'])}, this run needs {sorted(players)}")
    if path.is_dir():
        places = {f"{name}/{k}": v for name, player in players.items() for k, v in player.places().items()}
        tensors = distributed.load_sharded(path, places | {f"extra/{k}": v for k, v in (extra or {}).items()})
    else:
        tensors = load_file(path)
    for name, player in players.items():
        mine = {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}
        player.load(mine, record["counters"][name])
    for k, v in (extra or {}).items():
        v.copy_(tensors[f"extra/{k}"])
    return record["step"]
