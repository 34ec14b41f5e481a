"""The training loop: deal a batch, play an iteration, write down what happened, save, look."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from advdmd.rng import Rng
from advdmd.training import checkpoint, distributed
from advdmd.training.efficiency import EfficiencyMeter
from advdmd.training.learner import Learner
from advdmd.training.logger import MetricsLogger
from advdmd.types import ONE_RANK, Batch, Metrics, Ranks


@contextmanager
def _on_sigterm() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM ends nothing: it makes what is given answer True, in all processes once one of them was told."""
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        yield lambda: distributed.any_rank(bool(told))
    finally:
        signal.signal(signal.SIGTERM, before)


def is_due(done: int, every: int, total: int) -> bool:
    """Whether something that happens every `every` steps, and at the end, happens after `done` steps."""
    return done == total or (every > 0 and done % every == 0)


def train(
    algorithm: Any,
    cast: Any,
    deal: Callable[[int], tuple[Batch, list[int]]],
    folder: Path,
    *,
    seed: int,
    steps: int,
    save_every: int,
    look_every: int = 0,
    look: Callable[[int], object] | None = None,
    exam_every: int = 0,
    exam: Callable[[int], Metrics] | None = None,
    over: Callable[[], bool] = lambda: False,
    extra: Mapping[str, Tensor] | None = None,
    fingerprint: str = "",
    team: Ranks = ONE_RANK,
    meter: EfficiencyMeter | None = None,
    show: tuple[str, ...] = (),
    verdict: Callable[[], str] | None = None,
    track: Sequence[str] = (),
    label: str = "train",
) -> None:
    """Play `algorithm` from the newest checkpoint in `folder` to `steps`.

    deal(step) -> (batch, sample ids), pure. `look` and `exam` happen every so many steps and at the end, in all processes;
    what an exam finds is written with the step's metrics, and `over()` says whether the run may end there. `extra` are
    tensors changed in place that belong to the run's state; `fingerprint` names the recipe, so that a checkpoint of another
    one is refused.
    `team`: the processes that share each step's samples; `deal` gives this one its own. `meter` adds what a step costs;
    `track` names where the numbers go besides metrics.jsonl. `verdict` says in one line how the run is doing: printed every
    tenth of it (10 or more steps) behind the first quarter.
    Raises FloatingPointError, naming step and player, on the first loss or gradient that is not finite; SystemExit, behind a
    checkpoint, after SIGTERM.
    """
    players = {name: p for name, p in cast._asdict().items() if isinstance(p, Learner)}
    start = checkpoint.resume(folder / "checkpoints", players, extra, fingerprint)
    if start > steps:
        raise ValueError(f"{folder} has already run {start} steps, more than the {steps} asked for: choose another --out")
    if start and over():
        return
    distributed.barrier()  # until all have read the checkpoint
    # Metrics, exams, pictures and checkpoints are the first process's.
    book = MetricsLogger(folder, label, steps, start, show, track) if not team.rank else None
    with _on_sigterm() as terminated, closing(book) if book else nullcontext():
        for step in range(start, steps):
            try:
                batch, samples = deal(step)
                if meter:
                    meter.start(step)
                log = algorithm.iteration(cast, batch, step, Rng(seed, step, samples, team))
            except FloatingPointError as e:
                raise FloatingPointError(f"step {step}, {e}: the last checkpoint is untouched") from None
            log = distributed.mean_over_ranks(log | (meter.stop(step) if meter else {}))
            sat = bool(exam and exam_every and is_due(step + 1, exam_every, steps))
            if exam and sat:
                log = log | exam(step + 1)
            if book:
                book.write(step, log)
                if verdict and steps / 4 < step + 1 < steps and is_due(step + 1, max(10, steps // 10), steps):
                    book.progress.say(f"after {step + 1}: {verdict()}")
            if sat:
                distributed.barrier()  # the exam's file, which says whether the run is over, is written
            last = sat and over()
            if look and (last or is_due(step + 1, look_every, steps)):
                look(step + 1)
            stop = terminated()
            if last or stop or is_due(step + 1, save_every, steps):
                checkpoint.save(folder / "checkpoints", step + 1, players, extra, fingerprint, team)
            if last or step + 1 == steps:
                return
            if stop:
                if book:
                    print(f"\nstopped after step {step}, as asked: the same command goes on from it", file=sys.stderr)
                raise SystemExit(128 + signal.SIGTERM)
