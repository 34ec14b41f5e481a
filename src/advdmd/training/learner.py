"""Where losses meet an optimizer: the only file that calls backward."""

# torch and safetensors leave these types open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import torch
from torch import Tensor, nn

from advdmd.algorithms.base import Aux
from advdmd.training import distributed
from advdmd.training.gradient_halves import GradientHalves, damped
from advdmd.training.optimizer import OptimizerConfig, ParamGroup, adam, moment_names, restore_8bit_tables
from advdmd.types import Json, StepMetrics, as_floats

T = TypeVar("T")
SMALLEST = 1e-30  # divisor of squared norms: of gradients that are all zero the quotients are 0


@dataclass
class _OptimizerState:
    """An optimizer, the parameters that it moves with the multiples of its learning rate, and how many updates it has made."""

    config: OptimizerConfig
    params: list[list[nn.Parameter]]
    lr_scales: list[float]
    adam: torch.optim.Optimizer
    log_prefix: str
    updates: int = 0

    @property
    def all_params(self) -> list[nn.Parameter]:
        return [p for group in self.params for p in group]


class Learner:
    """A trainable network with its optimizers and its EMA.

    Call it to predict; `update` takes one optimizer step on losses.

    net: the network. call: what calling the learner does, usually backbone.velocity of the network. optimizers: name ->
    (configuration, parameter groups). ema_decay: decay of an exponential moving average of the parameters, moved after every
    update with decay min(ema_decay, (1 + n) / (10 + n)); None: no average. ema_net: a network with parameters of the same
    names, which from now on hold the average; by default new ones do. make_unsharded: makes another network of the same kind,
    into which one that is sharded over ranks is gathered. log_prefixes: of an optimizer's metrics, by default "NAME/" of
    "main", "NAME/OPTIMIZER_" of others.
    """

    def __init__(
        self,
        name: str,
        net: nn.Module,
        call: Callable[..., Tensor],
        optimizers: Mapping[str, tuple[OptimizerConfig, Sequence[ParamGroup]]],
        ema_decay: float | None = None,
        ema_net: nn.Module | None = None,
        make_unsharded: Callable[[], nn.Module] | None = None,
        log_prefixes: Mapping[str, str] | None = None,
    ):
        self.name, self.net, self._call, self.ema_decay = name, net, call, ema_decay
        self._ema_net, self._make_unsharded = ema_net, make_unsharded
        prefixes = {"main": f"{name}/"} | dict(log_prefixes or {})
        self._optimizers: dict[str, _OptimizerState] = {}
        for key, (config, groups) in optimizers.items():
            params, scales = [list(g.params) for g in groups], [g.lr_scale for g in groups]
            prefix = prefixes.get(key, f"{name}/{key}_")
            self._optimizers[key] = _OptimizerState(config, params, scales, adam(config, params), prefix)
        self._halves = {k: GradientHalves(o.all_params, o.config.betas[0]) for k, o in self._optimizers.items()}
        self.ema_updates = 0
        self.ema: dict[str, nn.Parameter] = {}
        if ema_decay is not None:
            own = {k: nn.Parameter(p.detach().clone(), requires_grad=False) for k, p in net.named_parameters()}
            if ema_net is not None:
                held = dict(ema_net.requires_grad_(False).named_parameters())
                for k, p in own.items():
                    held[k].data = p.data
                own = {k: held[k] for k in own}
            self.ema = own

    def __call__(self, *args: object) -> Tensor:
        return self._call(*args)

    @overload
    def update(self, losses: Iterable[Tensor], optimizer: str = "main", lr_scale: float = 1.0) -> StepMetrics: ...
    @overload
    def update(
        self, losses: Iterable[tuple[Tensor, Aux]], optimizer: str = "main", lr_scale: float = 1.0
    ) -> tuple[StepMetrics, Aux]: ...
    def update(
        self, losses: Iterable[Tensor] | Iterable[tuple[Tensor, Aux]], optimizer: str = "main", lr_scale: float = 1.0
    ) -> StepMetrics | tuple[StepMetrics, Aux]:
        """One optimizer step on the mean over samples of `losses`, each [n] or ([n], aux), back-propagated as they arrive.

        lr_scale >= 0 multiplies the learning rate of this step: a factor of the losses would be divided out by Adam.

        Clips the gradient, steps, moves the EMA. Returns the mean loss and the gradient norm; with aux also the auxiliary
        values of all samples, concatenated. Raises FloatingPointError, before anything has moved, if the loss or the gradient
        norm is not finite.
        """
        o = self._optimizers[optimizer]
        total, count, norm, found = self._back_propagate(optimizer, losses)
        grads = [p.grad for p in o.all_params if p.grad is not None]
        if local := [distributed.local_shard(g) for g in grads]:  # all in one call: on a GPU each call costs a launch
            torch._foreach_mul_(local, min(1.0, o.config.max_grad_norm / (norm + 1e-6)) / count)
        for setting, scale in zip(o.adam.param_groups, o.lr_scales, strict=True):
            setting["lr"] = o.config.learning_rate(o.updates) * scale * lr_scale
        o.adam.step()
        o.adam.zero_grad(set_to_none=True)
        o.updates += 1
        self._update_ema()
        metrics = {f"{o.log_prefix}loss": total / count, f"{o.log_prefix}grad_norm": norm} | self._gradient_alignment()
        return (metrics, _joined(found)) if found else metrics

    def _back_propagate(
        self, optimizer: str, losses: Iterable[Tensor] | Iterable[tuple[Tensor, Aux]]
    ) -> tuple[float, float, float, list[Aux]]:
        """Gradients of losses, each [n] or ([n], aux), summed over all samples and ranks into the parameters' `grad`.

        Returns the sum of the losses, the number of samples, the norm of their mean gradient, and what lies beside the losses.
        """
        o, count, found = self._optimizers[optimizer], 0, list[Aux]()
        device = o.all_params[0].device
        summed = torch.zeros((), dtype=distributed.widest_float(device), device=device)
        o.adam.zero_grad(set_to_none=True)
        for item in losses:
            loss, aux = item if isinstance(item, tuple) else (item, None)
            if aux is not None:
                found.append(aux)
            loss.sum().backward()
            summed, count = summed + loss.detach().sum(), count + len(loss)
        summed, count = distributed.all_reduce_gradients(o.all_params, summed, count)
        norm = distributed.grad_norm([p.grad for p in o.all_params if p.grad is not None])
        # The device is waited for here, once for each update.
        total, norm = as_floats(torch.stack([summed, norm.to(summed)]))
        norm = norm / max(count, 1)
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise FloatingPointError(f"{self.name}/{optimizer}: loss {total / count}, gradient norm {norm}")
        return total, count, norm, found

    def accumulated_rollouts(self, optimizer: str) -> int:
        """How many rollouts `accumulate` has added since the last step."""
        return self._halves[optimizer].rollouts

    def accumulate(self, halves: Sequence[Iterable[tuple[Tensor, Aux]]], optimizer: str) -> tuple[StepMetrics, Aux]:
        """Add the gradients of a rollout's two halves, losses [n] of each, to those of earlier rollouts; nothing moves.

        Returns the rollout's mean loss and gradient norm, how many rollouts there are since the last step, the agreement that
        earlier steps promise of so many, and the auxiliary values of all samples. Raises FloatingPointError as `update`.
        """
        o, held = self._optimizers[optimizer], self._halves[optimizer]
        total, count, norms, every = 0.0, 0.0, list[float](), list[Aux]()
        for half, losses in enumerate(halves):
            loss, n, norm, found = self._back_propagate(optimizer, losses)
            held.add(half)
            total, count, norms, every = total + loss, count + n, [*norms, norm], every + found
        o.adam.zero_grad(set_to_none=True)
        held.end_rollout()
        metrics: StepMetrics = {
            f"{o.log_prefix}loss": total / count,
            f"{o.log_prefix}grad_norm": max(norms),
            f"{o.log_prefix}expected_agreement": held.expected_agreement(),
            f"{o.log_prefix}rollouts": float(held.rollouts),
        }
        return metrics, _joined(every)

    def step_by_agreement(self, optimizer: str, scaled_by: str) -> StepMetrics:
        """One step along what `accumulate` has gathered, as long as its halves agree (GradientHalves.step); moves the EMA.

        The first of the optimizer's betas is the momentum.

        scaled_by: the optimizer whose second moments the gradients are divided by the root of, as Adam divides its own; they
        are taken as they are before its first update and with moments of 8 bits.
        """
        o = self._optimizers[optimizer]
        lr = o.config.learning_rate(o.updates)
        lrs = [lr * scale for group, scale in zip(o.params, o.lr_scales, strict=True) for _ in group]
        agreement, share = self._halves[optimizer].step(self._scales(scaled_by, o), lrs)
        o.updates += 1
        self._update_ema()
        return {f"{o.log_prefix}agreement": agreement, f"{o.log_prefix}step_share": share}

    def _scales(self, optimizer: str, of: _OptimizerState) -> list[Tensor] | None:
        """Roots of an optimizer's second moments, damped, like the shards of the other's parameters; None if it has none."""
        roots = self._root_second_moments(optimizer)
        if roots is None:
            return None
        return damped([roots[p] for p in of.all_params], of.all_params)

    @property
    def sharded(self) -> bool:
        """Whether the network is sharded over ranks."""
        return any(distributed.is_sharded(p) for p in self.net.parameters())

    @torch.no_grad()
    def _gradient_alignment(self) -> StepMetrics:
        """Of two optimizers that have both made updates.

        The cosine of their mean gradients (Adam's first moments), and how long the second's is beside the first's. Not
        measured with moments of 8 bits.
        """
        both = list(self._optimizers.items())
        if len(both) != 2 or not all(o.adam.state and o.config.state_bits == 32 for _, o in both):
            return {}
        (name, first), (other, second) = ((k, o.adam.state) for k, o in both)
        shared = [p for p in first if p in second]
        pairs = [(distributed.local_shard(first[p]["exp_avg"]), distributed.local_shard(second[p]["exp_avg"])) for p in shared]
        dots = torch.stack([torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]) for a, b in pairs])
        ab, aa, bb = distributed.all_reduce_sum(dots.sum(0, dtype=distributed.widest_float(dots.device)), shared)
        return {
            f"{self.name}/{other}_{name}_cosine": ab / (aa * bb).clamp(min=SMALLEST).sqrt(),
            f"{self.name}/{other}_{name}_ratio": (bb / aa.clamp(min=SMALLEST)).sqrt(),
        }

    @torch.no_grad()
    def _update_ema(self) -> None:
        if self.ema_decay is None:
            return
        decay = min(self.ema_decay, (1 + self.ema_updates) / (10 + self.ema_updates))
        pairs = [(distributed.local_shard(self.ema[k]), distributed.local_shard(p)) for k, p in self.net.named_parameters()]
        torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - decay)
        self.ema_updates += 1

    def second_moments(self, optimizer: str) -> Tensor | None:
        """The root of Adam's second moments [D] of an optimizer, with its bias corrected, as Adam divides gradients by it.

        None before its first update and with moments of 8 bits.
        """
        roots = self._root_second_moments(optimizer)
        return None if roots is None else torch.cat([s.flatten() for s in roots.values()])

    @torch.no_grad()
    def _root_second_moments(self, optimizer: str) -> dict[nn.Parameter, Tensor] | None:
        """The same by parameter, this rank's shards."""
        o = self._optimizers[optimizer]
        if not o.updates or o.config.state_bits != 32:
            return None
        correction = 1 - o.config.betas[1] ** o.updates
        squares = {p: o.adam.state[p]["exp_avg_sq"] if p in o.adam.state else torch.zeros_like(p) for p in o.all_params}
        return {p: (distributed.local_shard(s) / correction).sqrt() + 1e-8 for p, s in squares.items()}

    def ema_state_dict(self) -> dict[str, Tensor]:
        """The state dict with EMA weights, same shapes: buffers as they are, parameters averaged."""
        return {**self.net.state_dict(), **{k: v.data for k, v in self.ema.items()}}

    def ema_copy(self, of: T) -> T:
        """A copy of anything that holds the learner's network, such as a pipeline, in which its parameters are the EMA's.

        No weight of the network is copied: the copy follows the EMA. Not for sharded networks.
        """
        memo = {id(p): self.ema[k] for k, p in self.net.named_parameters()}
        return copy.deepcopy(of, memo)

    def ema_model(self) -> nn.Module:
        """The network with EMA weights; the learner's own weights stay in place. All ranks must call this.

        Of a network that is sharded over ranks: a gathered copy on the first rank, an empty module on the others.
        """
        if self.sharded:
            return self._gathered()
        return self.ema_copy(self.net) if self._ema_net is None else self._ema_net

    @torch.no_grad()
    def _gathered(self) -> nn.Module:
        assert self._make_unsharded
        net = self._make_unsharded() if distributed.is_main_process() else nn.Module()
        state = net.state_dict()
        for k, v in self.ema_state_dict().items():
            v = distributed.full_tensor(v)
            if k in state:
                state[k].copy_(v)
        return net

    def state_dict(self) -> tuple[dict[str, Tensor], Json]:
        """Everything that must survive a stop: tensors of any shape by name, and counters."""
        tensors = {f"net/{k}": v for k, v in self.net.state_dict().items()}
        tensors |= {f"ema/{k}": v.data for k, v in self.ema.items()}
        for key, o in self._optimizers.items():
            for i, p in enumerate(o.all_params):
                kept = {k: v for k, v in o.adam.state.get(p, {}).items() if k in moment_names(p, o.config)}
                tensors |= {f"adam/{key}/{i}/{k}": torch.as_tensor(v) for k, v in kept.items()}
            tensors |= self._halves[key].state_dict(f"halves/{key}/")
        counts = {
            k: {"updates": o.updates, "moved": len(o.adam.state), "halves": self._halves[k].counts}
            for k, o in self._optimizers.items()
        }
        return tensors, {"ema_updates": self.ema_updates, "optimizers": counts}

    def state_template(self) -> dict[str, Tensor]:
        """By the names of `state_dict`, a tensor of the same shape for each that it may hold."""
        out: dict[str, Tensor] = {f"net/{k}": v for k, v in self.net.state_dict().items()}
        out |= {f"ema/{k}": v.data for k, v in self.ema.items()}
        for key, o in self._optimizers.items():
            for i, p in enumerate(o.all_params):
                head, step = f"adam/{key}/{i}", torch.zeros((), device=p.device)
                out |= {f"{head}/exp_avg": p, f"{head}/exp_avg_sq": p, f"{head}/step": step}
            out |= self._halves[key].state_template(f"halves/{key}/")
        return out

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], counters: Json) -> None:
        """Inverse of `state_dict`, same shapes.

        Raises ValueError on missing or extra names, and on checkpoints of an earlier version.
        """
        if "optimizers" not in counters:
            raise ValueError(
                f"{self.name}: this checkpoint is an earlier version's and cannot be read: run again into another --out"
            )
        template = self.state_template()
        tensors = {k: distributed.distribute_like(v, template[k]) if k in template else v for k, v in tensors.items()}

        def part(head: str) -> dict[str, Tensor]:
            return {k[len(head) :]: v for k, v in tensors.items() if k.startswith(head)}

        self.net.load_state_dict(part("net/"), strict=True)
        if set(part("ema/")) != set(self.ema):
            raise ValueError(f"{self.name}: the saved EMA does not match this recipe's")
        for k, v in part("ema/").items():
            self.ema[k].copy_(v)
        self.ema_updates = counters["ema_updates"]
        for key, o in self._optimizers.items():
            o.updates, moved = counters["optimizers"][key]["updates"], counters["optimizers"][key]["moved"]
            o.adam.state.clear()  # what has not moved when the state was saved has none
            for i, p in enumerate(o.all_params):
                if saved := part(f"adam/{key}/{i}/"):
                    o.adam.state[p] = {k: v.to(p.device, copy=True) for k, v in saved.items()}
            whole = sum(set(state) == moment_names(p, o.config) for p, state in o.adam.state.items())
            if whole != moved:
                raise ValueError(f"{self.name}/{key}: whole optimizer state of {whole} parameters, {moved} were saved")
            if "halves" in counters["optimizers"][key]:  # not in checkpoints of earlier versions
                self._halves[key].load_state_dict(part(f"halves/{key}/"), counters["optimizers"][key]["halves"])
            if o.config.state_bits == 8:
                restore_8bit_tables(o.adam)
        if extra := set(tensors) - set(self.state_dict()[0]):
            raise ValueError(f"{self.name}: the checkpoint holds {sorted(extra)[0]}, which this recipe does not have")


def _joined(found: Sequence[Aux]) -> Aux:
    """Auxiliary values of several passes, each [n], as columns [N]."""
    return {k: torch.cat([aux[k] for aux in found]) for k in found[0]}
