"""Adam: its configuration and what is saved of its state."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from advdmd.models.quantization import import_bitsandbytes

MIN_8BIT_SIZE = 4096  # numbers of a parameter: below them 8-bit Adam keeps its moments in float32


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam without weight decay: `lr` after `warmup` updates, then constant or, with `decay` > 0, cosine to 2 % at `decay`."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    warmup: int = 0
    decay: int = 0
    bits: Literal[8, 32] = 32  # of each of Adam's moments; 8 as bitsandbytes keeps them (2110.02861)

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"Optim(lr={self.lr}): the learning rate must be positive")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"Optim(betas={self.betas}): both lie in [0, 1)")
        if not self.clip > 0:
            raise ValueError(f"Optim(clip={self.clip}): the gradient norm to clip at must be positive")
        if self.warmup < 0 or self.decay < 0:
            raise ValueError(f"Optim(warmup={self.warmup}, decay={self.decay}): counts of updates cannot be negative")

    def rate(self, update: int) -> float:
        """Learning rate of update 0, 1, ..."""
        ramp = min(1.0, (update + 1) / self.warmup) if self.warmup else 1.0
        fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, update / self.decay))) if self.decay else 1.0
        return self.lr * ramp * fall


def adam(optim: OptimizerConfig, groups: Sequence[tuple[list[nn.Parameter], float]]) -> torch.optim.Optimizer:
    setting = {"params": [{"params": p} for p, _ in groups], "lr": optim.lr, "betas": optim.betas}
    if optim.bits == 32:
        return torch.optim.Adam(**setting, fused=True)
    adam = import_bitsandbytes().optim.Adam8bit(**setting, min_8bit_size=MIN_8BIT_SIZE)
    adam.fill_qmap()
    return adam


def moment_names(p: Tensor, optim: OptimizerConfig) -> set[str]:
    """Names of what Adam keeps of a parameter that has moved, beside tables that are the same for all."""
    if optim.bits == 32:
        return {"step", "exp_avg", "exp_avg_sq"}
    return {"step", "state1", "state2"} | ({"absmax1", "absmax2"} if p.numel() >= MIN_8BIT_SIZE else set())


def restore_8bit_tables(adam: Any) -> None:
    """Give loaded moments of 8 bits what bitsandbytes keeps beside them: a plain count, tables of what bytes mean."""
    for state in adam.state.values():
        state["step"] = int(state["step"])
        if "absmax1" in state:
            device = state["absmax1"].device
            state |= {"qmap1": adam.name2qmap["dynamic"].to(device), "qmap2": adam.name2qmap["udynamic"].to(device)}
