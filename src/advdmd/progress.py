"""Progress of long work: one line with count, rate and time left."""

import sys
import time
from typing import TextIO


def duration(seconds: float) -> str:
    """Seconds as text: 12s, 3m05s, 2h10m."""
    s = int(seconds)
    return f"{s}s" if s < 60 else f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"


class Progress:
    """One line about `total` pieces of work, of which `start` are done.

    Rewritten on a terminal, else printed at most every `every` seconds.
    """

    def __init__(self, label: str, total: int, start: int = 0, out: TextIO | None = None, every: float = 20.0):
        self.label, self.total, self.start, self.out = label, total, start, out or sys.stderr
        self.every = 0.5 if self.out.isatty() else every
        self.began, self.printed = time.monotonic(), float("-inf")

    def __call__(self, done: int, note: str = "") -> None:
        """Report that `done` pieces are done."""
        now = time.monotonic()
        if now - self.printed < self.every and done < self.total:
            return
        self.printed, elapsed = now, now - self.began
        left = elapsed / max(1, done - self.start) * (self.total - done)
        line = f"{self.label} {done}/{self.total} · {duration(elapsed)} gone, {duration(left)} left"
        line += f" · {note}" if note else ""
        if self.out.isatty():
            self.out.write("\r\x1b[2K" + line + ("\n" if done >= self.total else ""))
        else:
            self.out.write(line + "\n")
        self.out.flush()

    def print_line(self, text: str) -> None:
        """Print a line that stays, above the one that is rewritten."""
        self.out.write(("\r\x1b[2K" if self.out.isatty() else "") + f"{self.label} {text}\n")
        self.out.flush()
