"""The record of a run: metrics.jsonl, trackers, and a console line with the time left."""

import json
from collections.abc import Sequence
from pathlib import Path

from advdmd.files import name_file_in_errors, read_lines, write_text
from advdmd.progress import Progress
from advdmd.training.trackers import open_tracker
from advdmd.types import Metrics

MAX_LINES = 10_000  # of metrics.jsonl, about: a longer run writes every second or third iteration


class MetricsLogger:
    """Appends one JSON line per iteration to `folder`/metrics.jsonl.

    On resume it drops lines of iterations that will be repeated.

    iterations, start: the run's last and first. console_keys: metrics of the console line. trackers: training.trackers.
    """

    def __init__(
        self,
        folder: Path,
        label: str,
        iterations: int,
        start: int = 0,
        console_keys: tuple[str, ...] = (),
        trackers: Sequence[str] = (),
    ):
        self.path, self.console_keys = folder / "metrics.jsonl", console_keys
        self.trackers = [open_tracker(kind, folder, label, start) for kind in trackers]
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = read_lines(self.path, "step", hint="delete that line")
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] < start))
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 - held open for the run
        self.progress = Progress(label, iterations, start)
        self.stride, self.last = max(1, -(-iterations // MAX_LINES)), iterations - 1

    def write(self, iteration: int, metrics: Metrics) -> None:
        """Write an iteration's metrics. Raises OSError that names the file if the disk is full."""
        # One iteration in `stride`, another one each time: updates that come every second iteration are not passed over.
        if (
            iteration % self.stride == iteration // self.stride % self.stride
            or iteration == self.last
            or any(key.startswith("eval/") for key in metrics)
        ):
            rounded = {k: float(f"{v:.6g}") for k, v in metrics.items()}
            with name_file_in_errors(self.path):
                self.file.write(json.dumps({"step": iteration, **rounded}) + "\n")
        for tracker in self.trackers:
            tracker.write(iteration, metrics)
        self.progress(iteration + 1, " ".join(f"{k} {metrics[k]:.4g}" for k in self.console_keys if k in metrics))

    def close(self) -> None:
        """Close the file and the trackers."""
        for tracker in self.trackers:
            tracker.close()
        self.file.close()
