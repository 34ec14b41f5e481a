"""How close an iteration is to the forward passes that it must make, measured while a run goes on."""

import time
from collections.abc import Callable

import torch

from advdmd.types import Metrics

EVERY = 50  # iterations between two measurements of a forward pass, which drifts with what else the machine does


class EfficiencyMeter:
    """Efficiency = forward passes that an iteration must make x seconds of one / seconds that it took.

    MFU (model FLOPs utilization) = operations of those passes / (what the device's matrix products could do in the time).

    forward(): one forward pass without gradient of `samples` samples. counted(iteration): forward passes per sample that an
    iteration must make. batch: samples of this rank in an iteration. operations: floating-point operations of a forward pass of
    a sample, 0 if not known. matrix_rate(): operations a second of the device, asked once. On a GPU the clock waits for the
    device.
    """

    def __init__(
        self,
        forward: Callable[[], object],
        samples: int,
        counted: Callable[[int], float],
        batch: int,
        operations: float = 0.0,
        matrix_rate: Callable[[], float] = lambda: 0.0,
    ):
        self.forward, self.samples, self.counted, self.batch = forward, samples, counted, batch
        self.operations, self.matrix_rate = operations, matrix_rate
        self.seconds_per_sample, self.started, self.rate = 0.0, 0.0, 0.0

    @torch.no_grad()
    def start(self, iteration: int) -> None:
        """Call before an iteration; measures a forward pass every so often."""
        if not self.seconds_per_sample or iteration % EVERY == 0:
            if not self.seconds_per_sample:
                self.forward()  # the first is slower
                self.rate = self.matrix_rate()
            before = _now()
            self.forward()
            self.seconds_per_sample = (_now() - before) / self.samples
        self.started = _now()

    def stop(self, iteration: int) -> Metrics:
        """Call after it; returns its forward passes per sample, its seconds and its efficiency."""
        counted, seconds = self.counted(iteration), _now() - self.started
        mfu = {"cost/mfu": counted * self.batch * self.operations / (seconds * self.rate)} if self.rate else {}
        return {
            "cost/forwards_per_sample": counted,
            "cost/seconds": seconds,
            "cost/efficiency": counted * self.batch * self.seconds_per_sample / seconds,
            **mfu,
        }


@torch.no_grad()
def matrix_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """Operations a second of a device's matrix products of a type: the best of five."""
    size = 512 if torch.device(device).type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(5):
        before = _now()
        a @ a  # pyright: ignore[reportUnusedExpression]
        best = max(best, 2.0 * size**3 / (_now() - before))
    return best


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()
    return time.perf_counter()
