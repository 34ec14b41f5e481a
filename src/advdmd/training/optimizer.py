"""Adam: its configuration, and which of its state is saved."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from advdmd.models.quantization import import_bitsandbytes

MIN_8BIT_SIZE = 4096  # numbers of a parameter: below that 8-bit Adam keeps its moments in float32


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam without weight decay.

    The learning rate is `lr` after `warmup_steps` updates, then constant or, with `decay_steps` > 0, a cosine to 2 % at
    `decay_steps`. Raises ValueError on values out of range.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    decay_steps: int = 0
    state_bits: Literal[8, 32] = 32  # of each of Adam's moments; 8 as bitsandbytes keeps them (2110.02861)

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"OptimizerConfig(lr={self.lr}): the learning rate must be positive")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"OptimizerConfig(betas={self.betas}): both lie in [0, 1)")
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"OptimizerConfig(max_grad_norm={self.max_grad_norm}): the gradient norm to clip at must be positive"
            )
        if self.warmup_steps < 0 or self.decay_steps < 0:
            raise ValueError(
                f"OptimizerConfig(warmup_steps={self.warmup_steps}, decay_steps={self.decay_steps}): must not be negative"
            )

    def learning_rate(self, update: int) -> float:
        """Learning rate of update 0, 1, ..."""
        ramp = min(1.0, (update + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, update / self.decay_steps))) if self.decay_steps else 1.0
        return self.lr * ramp * fall


class ParamGroup(NamedTuple):
    """Parameters that learn at a multiple of the configured rate."""

    params: Iterable[nn.Parameter]
    lr_scale: float = 1.0


def adam(config: OptimizerConfig, params: Sequence[Sequence[nn.Parameter]]) -> torch.optim.Optimizer:
    """Adam over groups of parameters, with moments of 32 or 8 bits."""
    groups = [{"params": list(p)} for p in params]
    if config.state_bits == 32:
        return torch.optim.Adam(groups, lr=config.lr, betas=config.betas, fused=True)
    optimizer = import_bitsandbytes().optim.Adam8bit(groups, lr=config.lr, betas=config.betas, min_8bit_size=MIN_8BIT_SIZE)
    optimizer.fill_qmap()
    return optimizer


def moment_names(p: Tensor, config: OptimizerConfig) -> set[str]:
    """Names of the state that Adam keeps of a parameter [...] that has moved, without tables that are the same for all."""
    if config.state_bits == 32:
        return {"step", "exp_avg", "exp_avg_sq"}
    return {"step", "state1", "state2"} | ({"absmax1", "absmax2"} if p.numel() >= MIN_8BIT_SIZE else set())


def restore_8bit_tables(optimizer: Any) -> None:
    """Give loaded moments of 8 bits what bitsandbytes keeps beside them: a plain count, and tables of what bytes mean."""
    for state in optimizer.state.values():
        state["step"] = int(state["step"])
        if "absmax1" in state:
            device = state["absmax1"].device
            qmap = optimizer.name2qmap
            state |= {"qmap1": qmap["dynamic"].to(device), "qmap2": qmap["udynamic"].to(device)}
