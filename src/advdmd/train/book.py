"""The record of a run: metrics.jsonl, and a console line with the time left."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from advdmd.files import read_lines, told, write_text
from advdmd.train.track import open_tracker
from advdmd.types import Log


def duration(seconds: float) -> str:
    """12s, 3m05s, 2h10m."""
    s = int(seconds)
    return f"{s}s" if s < 60 else f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"


class Progress:
    """One line with count, rate and time left: rewritten on a terminal, printed at most every `every` seconds elsewhere."""

    def __init__(self, label: str, total: int, start: int = 0, out: TextIO | None = None, every: float = 20.0):
        self.label, self.total, self.start, self.out = label, total, start, out or sys.stderr
        self.every = 0.5 if self.out.isatty() else every
        self.began, self.said = time.monotonic(), float("-inf")

    def __call__(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self.said < self.every and done < self.total:
            return
        self.said, ran = now, now - self.began
        left = ran / max(1, done - self.start) * (self.total - done)
        line = f"{self.label} {done}/{self.total} · {duration(ran)} gone, {duration(left)} left" + (
            f" · {note}" if note else ""
        )
        if self.out.isatty():
            self.out.write("\r\x1b[2K" + line + ("\n" if done >= self.total else ""))
        else:
            self.out.write(line + "\n")
        self.out.flush()

    def say(self, text: str) -> None:
        """A line that stays, above the one that is rewritten."""
        self.out.write(("\r\x1b[2K" if self.out.isatty() else "") + f"{self.label} {text}\n")
        self.out.flush()


LINES = 10_000  # that metrics.jsonl holds about at most: a longer run writes every second or third step


class Book:
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
        self.stride, self.last = max(1, -(-steps // LINES)), steps - 1

    def write(self, step: int, log: Log) -> None:
        # One step in `stride`, another one each time: turns that come every second step are not passed over.
        if (
            step % self.stride == step // self.stride % self.stride
            or step == self.last
            or any(key.startswith("exam/") for key in log)
        ):
            with told(self.path):
                self.file.write(json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in log.items()}}) + "\n")
        for tracker in self.trackers:
            tracker.write(step, log)
        self.progress(step + 1, " ".join(f"{k} {log[k]:.4g}" for k in self.show if k in log))

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
        self.file.close()
