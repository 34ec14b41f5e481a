"""Where losses meet an optimizer: the only file that calls backward."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from advdmd.training import distributed
from advdmd.training.optimizer import OptimizerConfig, adam, moment_names, restore_8bit_tables
from advdmd.types import Metrics


@dataclass
class _OptimizerState:
    """One optimizer: what it moves, at which multiple of the rate, and how often it has."""

    optim: OptimizerConfig
    groups: list[tuple[list[nn.Parameter], float]]
    adam: torch.optim.Optimizer
    updates: int = 0


class Learner:
    """A network with a part in the game: call it, or hand it losses to descend.

    `turns` names its optimizers: each an Optim and groups of (parameters, multiple of the rate). `ema` keeps an average
    of the parameters, moved after every descent with decay min(ema, (1 + n) / (10 + n)). `plain` makes another network of
    the same kind: one that is spread over processes is gathered into it to be looked at.
    """

    def __init__(
        self,
        name: str,
        net: nn.Module,
        call: Callable[..., Any],
        turns: Mapping[str, tuple[OptimizerConfig, Sequence[tuple[Iterable[nn.Parameter], float]]]],
        ema: float | None = None,
        plain: Callable[[], nn.Module] | None = None,
    ):
        self.name, self.net, self._call, self.ema_decay, self._plain = name, net, call, ema, plain
        self._turns: dict[str, _OptimizerState] = {}
        for key, (optim, groups) in turns.items():
            listed = [(list(p), m) for p, m in groups]
            self._turns[key] = _OptimizerState(optim, listed, adam(optim, listed))
        self.averages = 0
        self.ema = {k: p.detach().clone() for k, p in net.named_parameters()} if ema is not None else {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def descend(self, losses: Iterable[Tensor], turn: str = "main") -> Metrics:
        """One optimizer step on the mean of `losses` ([n] each), back-propagated as they arrive.

        Raises FloatingPointError, before anything moved, if the loss or the gradient norm is not finite.
        """
        t = self._turns[turn]
        params = [p for group, _ in t.groups for p in group]
        t.adam.zero_grad(set_to_none=True)
        total, count = 0.0, 0
        for loss in losses:
            loss.sum().backward()
            total, count = total + loss.detach().sum().item(), count + len(loss)
        total, count = distributed.all_reduce_gradients(params, total, count)
        grads = [p.grad for p in params if p.grad is not None]
        norm = distributed.grad_norm(grads) / count
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise FloatingPointError(f"{self.name}/{turn}: loss {total / count}, gradient norm {norm}")
        if mine := [distributed.local_shard(g) for g in grads]:  # all in one call: on a card each call costs its launch
            torch._foreach_mul_(mine, min(1.0, t.optim.clip / (norm + 1e-6)) / count)
        for setting, (_, multiple) in zip(t.adam.param_groups, t.groups, strict=True):
            setting["lr"] = t.optim.rate(t.updates) * multiple
        t.adam.step()
        t.adam.zero_grad(set_to_none=True)
        t.updates += 1
        self._average()
        label = self.name if turn == "main" else f"{self.name}/{turn}"
        return {f"{label}/loss": total / count, f"{label}/norm": norm} | self._agreement()

    @property
    def sharded(self) -> bool:
        """Whether the network is spread over processes."""
        return any(distributed.is_sharded(p) for p in self.net.parameters())

    @torch.no_grad()
    def _agreement(self) -> Metrics:
        """Of two optimizers that have both moved: the cosine of their mean gradients (Adam's first moments), and how long the
        second's is beside the first's. Moments of 8 bits are not asked."""
        if len(self._turns) != 2 or not all(t.updates and t.optim.bits == 32 for t in self._turns.values()):
            return {}
        first, second = (t.adam.state for t in self._turns.values())
        both = [p for p in first if p in second]
        pairs = [(distributed.local_shard(first[p]["exp_avg"]), distributed.local_shard(second[p]["exp_avg"])) for p in both]
        dots = torch.stack([torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]) for a, b in pairs])
        ab, aa, bb = distributed.all_reduce_sum(dots.double().sum(0), both).tolist()
        return {
            f"{self.name}/cosine": ab / math.sqrt(max(aa * bb, 1e-60)),
            f"{self.name}/ratio": math.sqrt(bb / max(aa, 1e-60)),
        }

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema_decay is None:
            return
        decay = min(self.ema_decay, (1 + self.averages) / (10 + self.averages))
        pairs = [(distributed.local_shard(self.ema[k]), distributed.local_shard(p)) for k, p in self.net.named_parameters()]
        torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - decay)
        self.averages += 1

    def averaged(self) -> dict[str, Tensor]:
        """The state dict to sample from: buffers as they are, parameters averaged where an average is kept."""
        return {**self.net.state_dict(), **self.ema}

    @contextmanager
    def averaging(self) -> Iterator[nn.Module]:
        """The network with its averaged weights inside; its own again outside. Of one that is spread, a gathered copy; all
        processes must ask for it."""
        if self.sharded:
            yield self._gathered()
            return
        own = {k: v.clone() for k, v in self.net.state_dict().items()}
        self.net.load_state_dict(self.averaged())
        try:
            yield self.net
        finally:
            self.net.load_state_dict(own)

    def _gathered(self) -> nn.Module:
        """The average in a network of the first process; the others give their shares, and get nothing to look at."""
        assert self._plain
        net = self._plain() if distributed.is_main_process() else nn.Module()
        mine = net.state_dict()
        for k, v in self.averaged().items():
            v = distributed.full_tensor(v)
            if k in mine:
                mine[k].copy_(v)
        return net

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that must survive a stop: tensors by name, and counters."""
        tensors = {f"net/{k}": v for k, v in self.net.state_dict().items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.items()}
        for key, t in self._turns.items():
            for i, p in enumerate(q for group, _ in t.groups for q in group):
                kept = {k: v for k, v in t.adam.state.get(p, {}).items() if k in moment_names(p, t.optim)}
                tensors |= {f"adam/{key}/{i}/{k}": torch.as_tensor(v) for k, v in kept.items()}
        counts = {k: {"updates": t.updates, "moved": len(t.adam.state)} for k, t in self._turns.items()}
        return tensors, {"averages": self.averages, "turns": counts}

    def places(self) -> dict[str, Tensor]:
        """By the names of `state`, a tensor like each that it may hold."""
        out = {f"net/{k}": v for k, v in self.net.state_dict().items()} | {f"ema/{k}": v for k, v in self.ema.items()}
        for key, t in self._turns.items():
            for i, p in enumerate(q for group, _ in t.groups for q in group):
                head = f"adam/{key}/{i}"
                out |= {f"{head}/exp_avg": p, f"{head}/exp_avg_sq": p, f"{head}/step": torch.zeros((), device=p.device)}
        return out

    def load(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Inverse of `state`; missing or extra names are errors."""
        if "turns" not in counters:
            raise ValueError(
                f"{self.name}: this checkpoint is an earlier version's and cannot be read: run again into another --out"
            )
        places = self.places()
        tensors = {k: distributed.distribute_like(v, places[k]) if k in places else v for k, v in tensors.items()}
        part = lambda head: {k[len(head) :]: v for k, v in tensors.items() if k.startswith(head)}  # noqa: E731
        self.net.load_state_dict(part("net/"), strict=True)
        if set(part("ema/")) != set(self.ema):
            raise ValueError(f"{self.name}: the saved average does not match this recipe's")
        for k, v in part("ema/").items():
            self.ema[k].copy_(v)
        self.averages = counters["averages"]
        for key, t in self._turns.items():
            t.updates, moved = counters["turns"][key]["updates"], counters["turns"][key]["moved"]
            for i, p in enumerate(q for group, _ in t.groups for q in group):
                if saved := part(f"adam/{key}/{i}/"):
                    t.adam.state[p] = {k: v.to(p.device, copy=True) for k, v in saved.items()}
            whole = sum(set(state) == moment_names(p, t.optim) for p, state in t.adam.state.items())
            if whole != moved:
                raise ValueError(f"{self.name}/{key}: whole optimizer state of {whole} parameters, {moved} were saved")
            if t.optim.bits == 8:
                restore_8bit_tables(t.adam)
        if extra := set(tensors) - set(self.state()[0]):
            raise ValueError(f"{self.name}: the checkpoint holds what this recipe has no place for: {sorted(extra)[0]}")
