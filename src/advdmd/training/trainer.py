"""The training loop: a batch, a train step, metrics, validation, sample grids, checkpoints."""

import math
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from advdmd.rng import Draw, Rng
from advdmd.training import checkpoint, distributed
from advdmd.training.efficiency import EfficiencyMeter
from advdmd.training.learner import Learner
from advdmd.training.logger import MetricsLogger
from advdmd.types import ONE_RANK, Columns, Json, Metrics, Ranks, StepMetrics, as_floats


class TakesTrainSteps(Protocol):
    """What the trainer needs of an algorithm."""

    @property
    def train_step(self) -> Callable[..., StepMetrics]: ...  # (models, batch, iteration, rng) -> metrics


def _never() -> bool:
    return False


@contextmanager
def _sigterm_received() -> Generator[Callable[[], bool], None, None]:
    """Inside, SIGTERM ends nothing. Yields a function that says, on all ranks, whether any of them has received it."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield _never
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield lambda: distributed.any_rank(bool(received))
    finally:
        signal.signal(signal.SIGTERM, before)


def is_due(done: int, every: int, total: int) -> bool:
    """Whether something that happens every `every` iterations, and at the end, happens after `done` iterations."""
    return done == total or (every > 0 and done % every == 0)


def as_numbers(metrics: StepMetrics) -> Metrics:
    """Metrics off the device, all in one transfer. What was not measured, nan, is left out."""
    held = {k: v for k, v in metrics.items() if isinstance(v, Tensor)}
    moved = as_floats(torch.stack([v.detach().float().reshape(()) for v in held.values()])) if held else []
    found = {k: float(v) for k, v in metrics.items() if not isinstance(v, Tensor)} | dict(zip(held, moved, strict=True))
    return {k: found[k] for k in metrics if not math.isnan(found[k])}


@contextmanager
def _names_iteration(iteration: int) -> Generator[None, None, None]:
    """Inside, a FloatingPointError gets the number of the iteration."""
    try:
        yield
    except FloatingPointError as e:
        raise FloatingPointError(f"iteration {iteration}, {e}: the last checkpoint is untouched") from None


class _Prepared(NamedTuple):
    """What an iteration starts from."""

    batch: Columns
    rng: Rng


@dataclass(kw_only=True)
class Trainer:
    """Runs an algorithm's train steps into a folder, from its newest checkpoint to `iterations`.

    batch_fn(iteration) -> (batch, sample ids), pure; the batch is moved to `device`. validate(n) and save_samples(n) are called
    after n iterations, every so many and at the end, by all ranks; the scores that `validate` returns are logged with the
    iteration's metrics, and `should_stop` says after it whether the run ends early. extra_state: tensors that belong to the
    run's state and are changed in place. fingerprint names the recipe: a checkpoint of another one is refused. data_contents:
    what the run's data hold now (training.checkpoint.check_data). efficiency measures an iteration's cost. prefetch: whether
    a thread prepares the next iteration's batch, and the random numbers that the last one drew, while this one runs; by default
    on CUDA. console_keys: metrics of the console line. health: one line about the run, printed every tenth of it (10 or more
    iterations) after its first quarter. trackers: training.trackers.
    """

    algorithm: TakesTrainSteps
    models: NamedTuple
    batch_fn: Callable[[int], tuple[Columns, list[int]]]
    folder: Path
    seed: int
    iterations: int
    save_every: int
    device: torch.device | str = "cpu"
    ranks: Ranks = ONE_RANK
    extra_state: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    fingerprint: str = ""
    data_contents: Json | None = None
    sample_every: int = 0
    save_samples: Callable[[int], object] | None = None
    eval_every: int = 0
    validate: Callable[[int], Metrics] | None = None
    should_stop: Callable[[], bool] = _never
    efficiency: EfficiencyMeter | None = None
    prefetch: bool | None = None
    console_keys: tuple[str, ...] = ()
    health: Callable[[], str] | None = None
    trackers: Sequence[str] = ()
    label: str = "train"

    @property
    def learners(self) -> dict[str, Learner]:
        """The trainable networks by their names in checkpoints."""
        return {name: m for name, m in self.models._asdict().items() if isinstance(m, Learner)}

    def run(self) -> None:
        """Train.

        Raises FloatingPointError, naming iteration and network, on the first loss or gradient that is not finite, and
        SystemExit, after a checkpoint, on SIGTERM.
        """
        folder, total, main = self.folder, self.iterations, not self.ranks.rank
        start = checkpoint.resume(folder / "checkpoints", self.learners, self.extra_state, self.fingerprint, self.data_contents)
        if start > total:
            raise ValueError(
                f"{folder} has already run {start} iterations, more than the {total} asked for: choose another --out"
            )
        if start and self.should_stop():
            return
        distributed.barrier()  # until all have read the checkpoint
        # The main process alone writes metrics, scores, pictures and records of checkpoints.
        logger = MetricsLogger(folder, self.label, total, start, self.console_keys, self.trackers) if main else None
        iterations = self._prepared(range(start, total))
        with _sigterm_received() as sigterm, closing(logger) if logger else nullcontext(), closing(iterations):
            for iteration, prepared in zip(range(start, total), iterations, strict=True):
                done = iteration + 1
                metrics = self._train_step(iteration, prepared)
                evaluated = bool(self.validate and self.eval_every and is_due(done, self.eval_every, total))
                if self.validate and evaluated:
                    metrics = metrics | self.validate(done)
                if logger:
                    logger.write(iteration, metrics)
                    if self.health and total / 4 < done < total and is_due(done, max(10, total // 10), total):
                        logger.progress.print_line(f"after {done}: {self.health()}")
                if evaluated:
                    distributed.barrier()  # the validation's record, which says whether the run is over, is written
                last = evaluated and self.should_stop()
                if self.save_samples and (last or is_due(done, self.sample_every, total)):
                    self.save_samples(done)
                stopped = sigterm()
                if last or stopped or is_due(done, self.save_every, total):
                    about = (self.extra_state, self.fingerprint, self.ranks, self.data_contents)
                    checkpoint.save(folder / "checkpoints", done, self.learners, *about)
                if last or done == total:
                    return
                if stopped:
                    if main:
                        print(
                            f"\nstopped by SIGTERM after iteration {iteration}: run the same command to resume", file=sys.stderr
                        )
                    raise SystemExit(128 + signal.SIGTERM)

    def _prepared(self, iterations: range) -> Generator[_Prepared, None, None]:
        """Of each iteration in turn; with `prefetch` the next is prepared in a thread while the caller has one."""
        ahead = torch.device(self.device).type == "cuda" if self.prefetch is None else self.prefetch
        if not (ahead and iterations):
            for i in iterations:
                prepared = self._prepare(i)
                self._measure_before(i)
                yield prepared
            return
        with ThreadPoolExecutor(1, "prefetch") as thread:
            draws: Sequence[Draw] = ()  # of the last iteration that is over
            following = thread.submit(self._prepare, iterations.start)
            for i in iterations:
                prepared = following.result()
                self._measure_before(i)  # while nothing else is on its way to the GPU
                if i + 1 in iterations:
                    following = thread.submit(self._prepare, i + 1, draws)
                yield prepared
                draws = prepared.rng.draws

    def _measure_before(self, iteration: int) -> None:
        if self.efficiency:
            self.efficiency.start(iteration)

    def _prepare(self, iteration: int, draws: Sequence[Draw] = ()) -> _Prepared:
        with _names_iteration(iteration):
            batch, samples = self.batch_fn(iteration)
        rng = Rng(self.seed, iteration, samples, self.ranks, self.device)
        rng.draw_ahead(draws)
        return _Prepared(batch.to(self.device), rng)

    def _train_step(self, iteration: int, prepared: _Prepared) -> Metrics:
        with _names_iteration(iteration):
            metrics = as_numbers(self.algorithm.train_step(self.models, prepared.batch, iteration, prepared.rng))
        return distributed.mean_over_ranks(metrics | (self.efficiency.stop(iteration) if self.efficiency else {}))
