"""Metrics for TensorBoard, wandb or trackio, beside metrics.jsonl: nothing of theirs is imported unless asked for."""

# torch and safetensors leave these types open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownLambdaType=false
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from advdmd.types import Metrics

TRACKERS = ("tensorboard", "wandb", "trackio")


class Tracker(NamedTuple):
    """Where a run's numbers also go."""

    write: Callable[[int, Metrics], object]
    close: Callable[[], object]


def check_trackers(kinds: Sequence[str]) -> None:
    """Raises ValueError, before any long work, if a tracker is unknown or not installed."""
    for kind in kinds:
        if kind not in TRACKERS:
            raise ValueError(f"report_to={kind!r}: one of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(kind) is None:
            raise ValueError(f"report_to={kind} needs {kind}: install advdmd with its extra, pip install 'advdmd[{kind}]'")


def open_tracker(kind: str, folder: Path, label: str, start: int) -> Tracker:
    """A tracker of the run in `folder`; a run that goes on at step `start` writes on from there."""
    return _tensorboard(folder, start) if kind == "tensorboard" else _service(kind, folder, label)


def _tensorboard(folder: Path, start: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def write(step: int, log: Metrics) -> None:
        for k, v in log.items():
            writer.add_scalar(k, v, step)

    return Tracker(write, writer.close)


def _service(kind: str, folder: Path, label: str) -> Tracker:
    """wandb, or trackio, which has the same calls."""
    tool: Any = importlib.import_module(kind)
    name = f"{label}-{folder.resolve().name}"
    where = {"id": name, "dir": str(folder)} if kind == "wandb" else {}
    tool.init(project="advdmd", name=name, resume="allow", **where)
    return Tracker(lambda step, log: tool.log(log, step=step), tool.finish)
