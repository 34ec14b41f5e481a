"""Gradients summed over several rollouts in two independent halves, whose agreement says how much of the sum is signal."""

# torch leaves these types open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from advdmd.training import distributed
from advdmd.types import Json, as_floats

DAMPING = 0.05  # of the mean scale, added to all: numbers that distribution matching hardly moves get no huge steps


SIGNAL_DECAY = 0.9  # of the running mean of what steps measured
COUNTS = ("rollouts", "weight", "square", "signal", "steps")


class GradientHalves:
    """Sums of the gradients of parameters over the samples of each half, on every rank the sums over all ranks.

    momentum in [0, 1): what a step leaves of the sums for the next one. rollouts: added since the last step.

    A single agreement of two halves is a noisy number, so steps go by a running mean: signal, the squared length of the true
    gradient beside the variance of one rollout's half. n rollouts are expected to agree by n signal / (1 + n signal).
    """

    def __init__(self, params: Sequence[nn.Parameter], momentum: float = 0.0):
        self.params, self.momentum = params, momentum
        self.sums: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.rollouts, self.signal, self.steps = 0, 0.0, 0
        self.weight, self.square = 0.0, 0.0  # sums over all rollouts of their weights now, and of the weights' squares

    @torch.no_grad()
    def add(self, half: int) -> None:
        """Add the parameters' `grad`, a sum over the samples of all ranks, to a half (0 or 1)."""
        if not self.sums[0]:
            self.sums = ([torch.zeros_like(p) for p in self.params], [torch.zeros_like(p) for p in self.params])
        pairs = [(s, p.grad) for s, p in zip(self.sums[half], self.params, strict=True) if p.grad is not None]
        if local := [(distributed.local_shard(s), distributed.local_shard(g)) for s, g in pairs]:
            torch._foreach_add_([s for s, _ in local], [g for _, g in local])

    def end_rollout(self) -> None:
        """Count what was added since the last call as one rollout."""
        self.rollouts, self.weight, self.square = self.rollouts + 1, self.weight + 1, self.square + 1

    def expected_agreement(self, rollouts: float | None = None) -> float:
        """The agreement in [0, 1] that earlier steps promise of so many rollouts, by default those since the last step."""
        n = (self.rollouts if rollouts is None else rollouts) * max(0.0, self.signal)
        return n / (1 + n)

    @torch.no_grad()
    def step(self, scales: Sequence[Tensor] | None, lrs: Sequence[float]) -> tuple[float, float]:
        """Move the parameters against the sum of both halves, divided by `scales`, like the parameters' shards.

        Returns the halves' agreement, the cosine of their gradients, and the step's share in [0, 1]. The step's root mean
        square is its learning rate in `lrs`, one for each parameter, times the share: the square root of the sum's reliability,
        2 c / (1 + c) of two halves with expected agreement c (Spearman-Brown), which estimates the squared cosine of the sum
        with the true gradient. Halves that do not agree in the mean move nothing.
        """
        effective = self.weight**2 / self.square  # as many rollouts of equal weight are as reliable
        a, b = (self._scaled(half, scales) for half in self.sums)
        ab, aa, bb = self._reduced([_dot(a, b), _dot(a, a), _dot(b, b)])
        agreement = ab / math.sqrt(max(aa * bb, 1e-60))
        found = min(0.9, agreement)
        share_of_mean = (1 - SIGNAL_DECAY) / (1 - SIGNAL_DECAY ** (self.steps + 1))
        self.signal += share_of_mean * (found / (1 - found) / effective - self.signal)
        c = self.expected_agreement(effective)
        share = math.sqrt(2 * c / (1 + c))
        if share and (square := aa + bb + 2 * ab) > 0:
            rms = math.sqrt(square / sum(p.numel() for p in self.params))
            for p, x, y, lr in zip(self.params, a, b, lrs, strict=True):
                distributed.local_shard(p.data).add_((x + y).to(p.dtype), alpha=-lr * share / rms)
        self.steps, self.rollouts = self.steps + 1, 0
        self.weight, self.square = self.momentum * self.weight, self.momentum**2 * self.square
        for half in self.sums if self.momentum else ():
            torch._foreach_mul_([distributed.local_shard(s) for s in half], self.momentum)
        self.sums = self.sums if self.momentum else ([], [])
        return agreement, share

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        """The sums [...] by names that begin with a prefix."""
        return {f"{prefix}{h}/{i}": s for h, half in enumerate(self.sums) for i, s in enumerate(half)}

    def state_template(self, prefix: str) -> dict[str, Tensor]:
        """By the names of `state_dict`, a tensor of the same shape for each that it may hold."""
        return {f"{prefix}{h}/{i}": p for h in range(2) for i, p in enumerate(self.params)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], counts: Json) -> None:
        """Inverse of `state_dict`: sums [...] by "HALF/INDEX", and the counts."""
        own = [
            [tensors[f"{h}/{i}"].to(p.device, copy=True) for i, p in enumerate(self.params)] for h in range(2 * bool(tensors))
        ]
        self.sums = (own[0], own[1]) if own else ([], [])
        for name in COUNTS:
            setattr(self, name, counts[name])

    @property
    def counts(self) -> Json:
        """Everything but the sums."""
        return {name: getattr(self, name) for name in COUNTS}

    def _scaled(self, half: Sequence[Tensor], scales: Sequence[Tensor] | None) -> list[Tensor]:
        local = [distributed.local_shard(s).float() for s in half]
        return local if scales is None else list(torch._foreach_div(local, list(scales)))

    def _reduced(self, values: Sequence[Tensor]) -> list[float]:
        return as_floats(distributed.all_reduce_sum(torch.stack(list(values)), self.params))


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The scalar product of two lists of tensors [...], in the widest type of their device."""
    dtype = distributed.widest_float(a[0].device)
    return torch.stack([(x * y).sum(dtype=dtype) for x, y in zip(a, b, strict=True)]).sum()


def damped(scales: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Scales [...], shards of the parameters' sizes, plus DAMPING times their mean over all parameters."""
    dtype = distributed.widest_float(scales[0].device)
    total = distributed.all_reduce_sum(torch.stack([s.sum(dtype=dtype) for s in scales]).sum(), params)
    more = (DAMPING * total / sum(p.numel() for p in params)).to(scales[0])
    return [s + more for s in scales]
