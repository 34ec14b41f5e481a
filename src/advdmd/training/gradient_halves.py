"""Gradients summed over several rollouts in two independent halves, whose agreement says how much of the sum is signal."""

# torch leaves these types open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from advdmd.training import distributed
from advdmd.types import Json

DAMPING = 0.05  # of the mean scale, added to all: numbers that distribution matching hardly moves get no huge steps


SIGNAL_DECAY = 0.9  # of the running mean of what steps measured


class GradientHalves:
    """Sums of the gradients of parameters over the samples of each half, on every rank the sums over all ranks.

    samples: of each half. rollouts: added since the last step. A single agreement of two halves is a noisy number, so steps go
    by a running mean: signal, the squared length of the true gradient beside the variance of one rollout's half. n rollouts are
    expected to agree by n signal / (1 + n signal).
    """

    def __init__(self, params: Sequence[nn.Parameter]):
        self.params = params
        self.sums: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.signal, self.steps = 0.0, 0  # the running mean and what it is of
        self.clear()

    def clear(self) -> None:
        """Back to nothing; the memory is given back."""
        self.sums, self.samples, self.rollouts = ([], []), [0, 0], 0

    @torch.no_grad()
    def add(self, half: int, samples: int) -> None:
        """Add the parameters' `grad`, a sum over `samples` samples of all ranks, to a half (0 or 1)."""
        if not self.sums[0]:
            self.sums = ([torch.zeros_like(p) for p in self.params], [torch.zeros_like(p) for p in self.params])
        self.samples[half] += samples
        pairs = [(s, p.grad) for s, p in zip(self.sums[half], self.params, strict=True) if p.grad is not None]
        if local := [(distributed.local_shard(s), distributed.local_shard(g)) for s, g in pairs]:
            torch._foreach_add_([s for s, _ in local], [g for _, g in local])

    @torch.no_grad()
    def agreement(self, scales: Sequence[Tensor] | None) -> float:
        """Cosine of the halves' gradients, each divided by `scales`, like the parameters' shards; 0 if a half is empty."""
        if not all(self.samples):
            return 0.0
        a, b = (self._scaled(half, scales) for half in self.sums)
        ab, aa, bb = self._reduced([_dot(a, b), _dot(a, a), _dot(b, b)])
        return ab / math.sqrt(max(aa * bb, 1e-60))

    @property
    def expected_agreement(self) -> float:
        """The agreement in [0, 1] that earlier steps promise of so many rollouts; 0 before the first step."""
        n = self.rollouts * max(0.0, self.signal)
        return n / (1 + n)

    @torch.no_grad()
    def step(self, scales: Sequence[Tensor] | None, lrs: Sequence[float]) -> float:
        """Move the parameters against the sum of both halves, divided by `scales`, and start anew. -> share in [0, 1].

        The step's root mean square is its learning rate in `lrs`, one for each parameter, times the share: the square root of
        the sum's reliability, 2 c / (1 + c) of two halves with expected agreement c (Spearman-Brown), which estimates the
        squared cosine of the sum with the true gradient. Halves that do not agree, now and in the mean, move nothing.
        """
        found = min(0.9, self.agreement(scales))
        weight = (1 - SIGNAL_DECAY) / (1 - SIGNAL_DECAY ** (self.steps + 1))
        self.signal += weight * (found / (1 - found) / self.rollouts - self.signal)
        self.steps += 1
        c = self.expected_agreement
        share = math.sqrt(2 * c / (1 + c))
        total = [a + b for a, b in zip(*(self._scaled(half, scales) for half in self.sums), strict=True)]
        (square,) = self._reduced([_dot(total, total)])
        if share and square:
            rms = math.sqrt(square / sum(p.numel() for p in self.params))
            for p, step, lr in zip(self.params, total, lrs, strict=True):
                distributed.local_shard(p.data).add_(step.to(p.dtype), alpha=-lr * share / rms)
        self.clear()
        return share

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        """The sums [...] by names that begin with a prefix; none after a step."""
        return {f"{prefix}{h}/{i}": s for h, half in enumerate(self.sums) for i, s in enumerate(half)}

    def state_template(self, prefix: str) -> dict[str, Tensor]:
        """By the names of `state_dict`, a tensor of the same shape for each that it may hold."""
        return {f"{prefix}{h}/{i}": p for h in range(2) for i, p in enumerate(self.params)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], counts: Json) -> None:
        """Inverse of `state_dict`: sums [...] by "HALF/INDEX", and the counts."""
        self.clear()
        if tensors:
            own = [[tensors[f"{h}/{i}"].to(p.device, copy=True) for i, p in enumerate(self.params)] for h in range(2)]
            self.sums = (own[0], own[1])
        self.samples, self.rollouts = list(counts["samples"]), counts["rollouts"]
        self.signal, self.steps = counts["signal"], counts["steps"]

    @property
    def counts(self) -> Json:
        """Samples of each half and rollouts since the last step, and the running mean with the number of its steps."""
        return {"samples": self.samples, "rollouts": self.rollouts, "signal": self.signal, "steps": self.steps}

    def _scaled(self, half: Sequence[Tensor], scales: Sequence[Tensor] | None) -> list[Tensor]:
        local = [distributed.local_shard(s).float() for s in half]
        return local if scales is None else list(torch._foreach_div(local, list(scales)))

    def _reduced(self, values: Sequence[Tensor]) -> list[float]:
        return distributed.all_reduce_sum(torch.stack(list(values)), self.params).tolist()


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The scalar product of two lists of tensors [...], in float64."""
    return torch.stack([(x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)]).sum()


def damped(scales: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Scales [...], shards of the parameters' sizes, plus DAMPING times their mean over all parameters."""
    total = distributed.all_reduce_sum(torch.stack([s.sum(dtype=torch.float64) for s in scales]).sum(), params).item()
    return list(torch._foreach_add(list(scales), DAMPING * total / sum(p.numel() for p in params)))
