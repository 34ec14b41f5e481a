"""The record of a run: metrics.jsonl, and a console line with the time left."""

import json
from collections.abc import Sequence
from pathlib import Path

from advdmd.files import name_file_in_errors, read_lines, write_text
from advdmd.progress import Progress
from advdmd.training.trackers import open_tracker
from advdmd.types import Metrics

MAX_LINES = 10_000  # that metrics.jsonl holds about at most: a longer run writes every second or third step


class MetricsLogger:
    """Appends one JSON line per step; on resume it forgets lines of steps that will be done again."""

    def __init__(
        self, folder: Path, label: str, steps: int, start: int = 0, show: tuple[str, ...] = (), track: Sequence[str] = ()
    ):
        self.path, self.show = folder / "metrics.jsonl", show
        self.trackers = [open_tracker(kind, folder, label, start) for kind in track]
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = read_lines(self.path, "step", way_out="delete that line")
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] < start))
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 - held open for the run
        self.progress = Progress(label, steps, start)
        self.stride, self.last = max(1, -(-steps // MAX_LINES)), steps - 1

    def write(self, step: int, log: Metrics) -> None:
        # One step in `stride`, another one each time: turns that come every second step are not passed over.
        if (
            step % self.stride == step // self.stride % self.stride
            or step == self.last
            or any(key.startswith("exam/") for key in log)
        ):
            with name_file_in_errors(self.path):
                self.file.write(json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in log.items()}}) + "\n")
        for tracker in self.trackers:
            tracker.write(step, log)
        self.progress(step + 1, " ".join(f"{k} {log[k]:.4g}" for k in self.show if k in log))

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
        self.file.close()
