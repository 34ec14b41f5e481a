"""Adapters of several roles on one frozen base, and gradient checkpointing that remembers the role.

Switching adapters the libraries' way flips `requires_grad`, and checkpointing recomputes under whatever adapter is active when
gradients flow: both corrupt gradients without a word. Here a pass only changes the routing, and what is recomputed runs in
the role, and with the frozen parameters, that it first ran with. Uses peft's private routing fields, so peft is pinned.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from advdmd.models import quantize

SEP = "/"  # in an adapter's parameter names, for the dots that nn.Module does not allow


class _Merged(torch.autograd.Function):
    """x (W + B A)^T + bias for a frozen W. The sum is made anew in each pass, so a token pays for one product instead of three,
    two of them thin, which a network of tiny width feels most (benchmarks/iteration.py)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(x, weight, a, b)
        return F.linear(x, torch.addmm(weight, b, a), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, a, b = ctx.saved_tensors  # asked once: where a block is run again, it is run at this line
        down, told_a, told_b = ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        g, said = grad.flatten(0, -2), x.flatten(0, -2)
        grad_x = (g @ torch.addmm(weight, b, a)).view_as(x) if down else None
        grad_a = (g @ b).t() @ said if told_a else None
        grad_b = g.t() @ (said @ a.t()) if told_b else None
        return grad_x, None, None, grad_a, grad_b


def _adapted(self: Any, x: Tensor) -> Tensor:
    """What peft's layer does without dropout and with a scale of 1. On a base of another type than the adapter the adapter's
    share is its own sum, or what is small in it would be rounded away."""
    base = self.base_layer
    if self._disable_adapters:
        return base(x)
    (name,) = self._active_adapter
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    if type(base) is nn.Linear and base.weight.dtype == x.dtype == a.dtype:
        return _Merged.apply(x, base.weight, base.bias, a, b)
    out = base(x)
    return (out + F.linear(F.linear(x.to(a.dtype), a), b)).to(out.dtype)


class Roles:
    """One network with an adapter for each of `names`; outside `playing` it is the untouched base, bit for bit.

    `targets`: endings of the names of the linear layers that get one. Alpha equals the rank, so the scale is 1 and an
    exported adapter means the same with or without its metadata. Adapters are float32 on a base of any type.
    """

    def __init__(self, net: nn.Module, names: Sequence[str], rank: int, targets: Sequence[str], seed: int = 0):
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        net.requires_grad_(False)
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            for name in names:
                inject_adapter_in_model(config, net, name)
        self.net, self.now = net, ""
        self.layers: list[Any] = [m for m in net.modules() if isinstance(m, BaseTunerLayer)]
        for layer in self.layers:
            layer.forward = MethodType(_adapted, layer)
        for key, p in net.named_parameters():
            if "lora_" in key:  # peft made them of the base's type, in which small steps would be lost
                p.data = p.data.float()
                p.requires_grad_(True)
        self._route("")

    def _route(self, name: str) -> None:
        for layer in self.layers:
            layer._disable_adapters, layer._active_adapter = not name, [name]
        self.now = name

    @contextmanager
    def playing(self, name: str) -> Iterator[None]:
        """Passes inside go through the adapter `name`; through the base alone if it is empty."""
        before = self.now
        self._route(name)
        try:
            yield
        finally:
            self._route(before)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters, named by their place: "blocks.0.attn.to_q.lora_A"."""
        marked = ((k.partition(f".{name}.weight"), p) for k, p in self.net.named_parameters())
        return {head: p for (head, found, _), p in marked if found and ".lora_" in head}


class Role(nn.Module):
    """The base in one role: called like the transformer, but its parameters are the adapter's alone."""

    def __init__(self, roles: Roles, name: str):
        super().__init__()
        self._roles, self.name = (roles,), name  # in a tuple: the base is nobody's submodule
        for key, p in roles.parameters(name).items():
            self.register_parameter(key.replace(".", SEP), p)

    @property
    def roles(self) -> Roles:
        return self._roles[0]

    def forward(self, *args: Any, **kw: Any) -> Any:
        with self.roles.playing(self.name):
            return self.roles.net(*args, **kw)

    def get_submodule(self, target: str) -> nn.Module:
        """Of the base: where backbones look for blocks and embeddings."""
        return self.roles.net.get_submodule(target) if target else self

    def weights(self) -> dict[str, Tensor]:
        """The adapter as diffusers and ComfyUI name it: "transformer.blocks.0.attn.to_q.lora_A.weight"."""
        return {f"transformer.{k.replace(SEP, '.')}.weight": v.detach() for k, v in self.named_parameters()}

    @torch.no_grad()
    def fused(self) -> dict[str, Tensor]:
        """State dict of a plain transformer, on the CPU: base weights, as numbers, with this adapter added to them."""
        net = self.roles.net
        plain = ((k.replace(".base_layer", ""), v) for k, v in net.state_dict().items() if ".lora_" not in k)
        state = {k: v.cpu() for k, v in plain if torch.is_tensor(v)}
        for name, layer in net.named_modules():
            if (numbers := quantize.weight(layer)) is not None:
                name = name.replace(".base_layer", "")
                for k in layer.state_dict():
                    if k != "bias":
                        state.pop(f"{name}.{k}", None)
                state[f"{name}.weight"] = numbers.cpu()
        mine = dict(self.named_parameters())
        for key, a in mine.items():
            place, _, kind = key.rpartition(f"{SEP}lora_")
            if kind == "A":
                weight, b = place.replace(SEP, ".") + ".weight", mine[f"{place}{SEP}lora_B"]
                state[weight] = (state[weight].to(b.dtype) + (b @ a).cpu()).to(state[weight].dtype)
        return state


def checkpointed(net: nn.Module, roles: Roles | None = None) -> None:
    """Have a diffusers transformer keep only what enters its blocks and run them again when gradients flow.

    A block runs again as it ran: in its role, and with the same parameters frozen (models.cast.frozen), or the graphs of the
    two passes would differ.
    """

    def run(block: nn.Module, *args: Any) -> Any:
        learning = [p.requires_grad for p in block.parameters()]
        role = roles.now if roles else ""

        def again(*args: Any) -> Any:
            now = [p.requires_grad for p in block.parameters()]
            _set(block, learning)
            try:
                if roles is None:
                    return block(*args)
                with roles.playing(role):
                    return block(*args)
            finally:
                _set(block, now)

        return checkpoint(again, *args, use_reentrant=False)

    enable: Any = net
    enable.enable_gradient_checkpointing(run)


def _set(block: nn.Module, flags: Sequence[bool]) -> None:
    for p, flag in zip(block.parameters(), flags, strict=True):
        p.requires_grad_(flag)
