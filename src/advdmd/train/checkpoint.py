"""Checkpoints: safetensors plus a JSON record written last; atomic, hashed, the newest good one is found again."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from advdmd.files import file_hash, write_atomically, write_text
from advdmd.train.learner import Learner

KEEP = 2  # checkpoints kept; the one before the newest survives a damaged newest


def save(
    folder: Path, step: int, players: Mapping[str, Learner], extra: Mapping[str, Tensor] | None = None, run: str = ""
) -> Path:
    """Write `folder`/step-N.safetensors and its record, then drop all but the newest KEEP. `run` tells runs apart."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {f"extra/{k}": v for k, v in (extra or {}).items()}
    counters: dict[str, Any] = {}
    for name, player in players.items():
        state, counters[name] = player.state()
        tensors |= {f"{name}/{k}": v.detach().to("cpu", copy=True).contiguous() for k, v in state.items()}
    path = folder / f"step-{step:07d}.safetensors"
    write_atomically(path, lambda p: save_file(tensors, p))
    record = {"step": step, "sha256": file_hash(path), "run": run, "counters": counters}
    write_text(path.with_suffix(".json"), json.dumps(record))
    for old in sorted(folder.glob("step-*.json"))[:-KEEP]:
        old.unlink()
    for tensors_file in folder.glob("step-*.safetensors"):
        if not tensors_file.with_suffix(".json").exists():
            tensors_file.unlink()
    return path


def newest(folder: Path, say: Callable[[str], object] = print) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose bytes match its record; damaged ones are named and passed over."""
    for record_file in sorted(folder.glob("step-*.json"), reverse=True):
        path = record_file.with_suffix(".safetensors")
        try:
            record = json.loads(record_file.read_text())
            if file_hash(path) == record["sha256"]:
                return path, record
            say(f"checkpoint {path} is damaged (its sha256 differs from its record): trying the one before")
        except (OSError, ValueError, KeyError) as e:
            say(f"checkpoint {record_file} cannot be read ({e}): trying the one before")
    return None


def resume(
    folder: Path, players: Mapping[str, Learner], extra: Mapping[str, Tensor] | None = None, run: str | None = None
) -> int:
    """Load the newest good checkpoint into the players and `extra`, in place; returns the step to go on from (0: none).

    Raises ValueError if there are checkpoints but none is good, or if they are of another run.
    """
    from safetensors.torch import load_file

    found = newest(folder)
    if found is None:
        if any(folder.glob("step-*.json")):  # tensors without a record were being written when the run was killed
            raise ValueError(f"{folder}: every checkpoint is damaged; remove the folder to start again")
        return 0
    tensors, record = load_file(found[0]), found[1]
    if run is not None and record["run"] != run:
        raise ValueError(f"{found[0]} is a checkpoint of another recipe: choose another --out")
    if set(record["counters"]) != set(players):
        raise ValueError(f"{found[0]}: holds {sorted(record['counters'])}, this run needs {sorted(players)}")
    for name, player in players.items():
        mine = {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}
        player.load(mine, record["counters"][name])
    for k, v in (extra or {}).items():
        v.copy_(tensors[f"extra/{k}"])
    return record["step"]
