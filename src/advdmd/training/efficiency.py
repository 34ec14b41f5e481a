"""How close an iteration is to the forwards it must make: eta, measured while a run goes on."""

import time
from collections.abc import Callable

import torch

from advdmd.types import Metrics

EVERY = 50  # steps between two measurements of a forward, which drifts with what else the machine does


class EfficiencyMeter:
    """eta = forwards that step must make x seconds of one / seconds it took.

    forward(): one forward without gradient of `samples` samples; counted(step): forwards per sample that a step must make;
    batch: samples a step has here. On a card the clock waits for it.
    """

    def __init__(self, forward: Callable[[], object], samples: int, counted: Callable[[int], float], batch: int):
        self.forward, self.samples, self.counted, self.batch = forward, samples, counted, batch
        self.unit, self.began = 0.0, 0.0

    @torch.no_grad()
    def start(self, step: int) -> None:
        """Before a step; measures a forward now and then."""
        if not self.unit or step % EVERY == 0:
            if not self.unit:
                self.forward()  # the first is slower
            began = _now()
            self.forward()
            self.unit = (_now() - began) / self.samples
        self.began = _now()

    def stop(self, step: int) -> Metrics:
        """After it."""
        F = self.counted(step)
        return {"cost/forwards": F, "cost/eta": F * self.batch * self.unit / (_now() - self.began)}


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
