"""Adapters of several networks on one frozen base, and gradient checkpointing that remembers which adapter was active.

Switching adapters the libraries' way flips `requires_grad`, and checkpointing recomputes with the adapter that is active at
backward time: both corrupt gradients silently. Here a pass only changes the routing, and what is recomputed runs with the
adapter, and with the frozen adapters, that it first ran with.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from advdmd.models import quantization

SEP = "/"  # in an adapter's parameter names, for the dots that nn.Module does not allow

Context = Any  # of an autograd function


class _MergedLoraLinear(torch.autograd.Function):
    """x (W + B A)^T + bias with W frozen.

    The sum is made once per pass and kept for its backward, so a token costs one product instead of three, two of them thin:
    a network of tiny width gains most (benchmarks/iteration.py).
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:  # pyright: ignore
        merged = torch.addmm(weight, b, a)
        ctx.save_for_backward(x, merged, a, b)
        return F.linear(x, merged, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, merged, a, b = ctx.saved_tensors
        needs_x, needs_a, needs_b = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        g, tokens = grad.flatten(0, -2), x.flatten(0, -2)
        grad_x = (g @ merged).view_as(x) if needs_x else None
        # Rank x tokens, and no product of two transposed: thin ones are several times as quick that way on a CPU (docs/log.md).
        grad_a = (b.t().contiguous() @ g.t()) @ tokens if needs_a else None
        grad_b = ((a @ tokens.t()) @ g).t() if needs_b else None
        return grad_x, None, None, grad_a, grad_b


def _lora_forward(layer: Any, x: Tensor) -> Tensor:
    """What peft's layer does without dropout and with a scale of 1, with the active adapter; x [..., in] -> [..., out].

    On a base of another type than the adapter the adapter's part is added on its own, in the type of x: merged into the weight
    its small numbers would be rounded away. A method of the layer, so that layers alike share one compiled graph.
    """
    shared_base, base = layer.shared_base, layer.base_layer
    if not shared_base.active_adapter:
        return base(x)
    a, b = (part[shared_base.active_adapter].weight for part in (layer.lora_A, layer.lora_B))
    if shared_base.active_adapter in shared_base.frozen_adapters:
        a, b = a.detach(), b.detach()
    if type(base) is nn.Linear and base.weight.dtype == x.dtype == a.dtype:
        if not torch.is_grad_enabled():
            return F.linear(x, torch.addmm(base.weight, b, a), base.bias)
        return _MergedLoraLinear.apply(x, base.weight, base.bias, a, b)
    out = base(x)
    return out + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)).to(out.dtype)


class SharedBase:
    """One frozen network with an adapter for each of `names`; outside `active` it is the untouched base, bit for bit.

    targets: endings of the names of the linear layers that get adapters. Alpha equals the rank, so the scale is 1 and an
    exported adapter means the same with or without its metadata. Adapters are float32 on a base of any type.
    """

    def __init__(self, net: nn.Module, names: Sequence[str], rank: int, targets: Sequence[str], seed: int = 0):
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        net.requires_grad_(False)
        torch.manual_seed(seed)
        every, ends = net.named_modules(), tuple(f".{t}" for t in targets)
        layers = [k for k, m in every if isinstance(m, nn.Linear) and f".{k}".endswith(ends)]  # in full: others may end so
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            for name in names:  # made on the CPU, the same numbers on any device; each goes to its layer's
                inject_adapter_in_model(config, net, name)
        self.net, self.names, self.active_adapter, self.frozen_adapters = net, tuple(names), "", frozenset[str]()
        tuners: list[Any] = [m for m in net.modules() if isinstance(m, BaseTunerLayer)]
        for layer in tuners:
            layer.shared_base, layer.forward = self, MethodType(_lora_forward, layer)
        for key, p in net.named_parameters():
            if "lora_" in key:  # peft made them of the base's type, in which small steps would be lost
                p.data = p.data.float()
                p.requires_grad_(True)

    @contextmanager
    def active(self, name: str, frozen_adapters: frozenset[str] | None = None) -> Iterator[None]:
        """Passes inside go through the adapter `name`, or through the base alone if the name is empty.

        frozen_adapters: those that are constants inside; by default those that were.
        """
        before = self.active_adapter, self.frozen_adapters
        self.active_adapter = name
        self.frozen_adapters = self.frozen_adapters if frozen_adapters is None else frozen_adapters
        try:
            yield
        finally:
            self.active_adapter, self.frozen_adapters = before

    def checkpoint(self, blocks: Sequence[nn.Module]) -> None:
        """Keep only the inputs of these blocks and run the blocks again in the backward pass, as they first ran."""

        def forward(run: Callable[..., Any], own: Mapping[str, Sequence[nn.Parameter]], *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return run(*args, **kwargs)
            learning = [] if self.active_adapter in self.frozen_adapters else own.get(self.active_adapter, [])
            inputs, n = (*args, *kwargs.values()), len(args)

            def positional(*values: Any) -> Any:
                return run(*values[:n], **dict(zip(kwargs, values[n:], strict=True)))

            return _Recompute.apply(self, positional, len(inputs), *inputs, *learning)

        for block in blocks:
            own = {n: [p for k, p in block.named_parameters() if f".{n}." in k and "lora_" in k] for n in self.names}
            block.forward = partial(forward, block.forward, own)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters, named by their place: "blocks.0.attn.to_q.lora_A"."""
        marked = ((k.partition(f".{name}.weight"), p) for k, p in self.net.named_parameters())
        return {head: p for (head, found, _), p in marked if found and ".lora_" in head}


class _Recompute(torch.autograd.Function):
    """run(*inputs), of which only the inputs are kept.

    It runs once more in the backward pass, with the adapter of the first time.

    The last inputs are the adapter's parameters, which `run` does not take but which get their gradients here. Tensors in
    tuples or dicts (rotary embeddings) are constants. torch's own checkpointing keeps a record of every tensor inside, which
    costs more than the launches of a small block.
    """

    @staticmethod
    def forward(ctx: Context, shared_base: SharedBase, run: Callable[..., Any], n: int, *inputs: Any) -> Any:  # pyright: ignore
        ctx.set_materialize_grads(False)
        ctx.run, ctx.n = run, n
        ctx.active = partial(shared_base.active, shared_base.active_adapter, shared_base.frozen_adapters)
        ctx.plain = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        return run(*inputs[:n])

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grads: Any) -> Any:
        needed = ctx.needs_input_grad[3:]
        kept = [plain if x is None else x for x, plain in zip(ctx.saved_tensors, ctx.plain, strict=True)]
        inputs, learning = kept[: ctx.n], kept[ctx.n :]
        inputs = [x.detach().requires_grad_(n) if isinstance(x, Tensor) else x for x, n in zip(inputs, needed, strict=False)]
        with torch.enable_grad(), ctx.active():
            out = ctx.run(*inputs)
        pairs = zip(out if isinstance(out, tuple) else (out,), grads, strict=True)
        both = [(y, g) for y, g in pairs if g is not None and y.requires_grad]
        leaves = [x for x, n in zip(inputs + learning, needed, strict=True) if n]
        found = iter(torch.autograd.grad([y for y, _ in both], leaves, [g for _, g in both], allow_unused=True))
        return None, None, None, *(next(found) if n else None for n in needed)


class LoraModel(nn.Module):
    """The base with one adapter: called like the transformer, but its parameters are the adapter's alone."""

    def __init__(self, shared_base: SharedBase, name: str):
        super().__init__()
        self._shared_base, self.name = (shared_base,), name  # in a tuple: the base is nobody's submodule
        for key, p in shared_base.parameters(name).items():
            self.register_parameter(key.replace(".", SEP), p)

    @property
    def shared_base(self) -> SharedBase:
        """The base and all of its adapters."""
        return self._shared_base[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.shared_base.active(self.name):
            return self.shared_base.net(*args, **kwargs)

    def get_submodule(self, target: str) -> nn.Module:
        """A submodule of the base: where backbones look for blocks and embeddings."""
        return self.shared_base.net.get_submodule(target) if target else self

    def lora_state_dict(self) -> dict[str, Tensor]:
        """The adapter's weights, A [rank, in] and B [out, rank], as diffusers and ComfyUI name them.

        "transformer.blocks.0.attn.to_q.lora_A.weight".
        """
        return {f"transformer.{k.replace(SEP, '.')}.weight": v.detach() for k, v in self.named_parameters()}

    @torch.no_grad()
    def fused_state_dict(self) -> dict[str, Tensor]:
        """State dict of a plain transformer, on the CPU.

        The base's weights [out, in], dequantized, with this adapter's B A added.
        """
        net = self.shared_base.net
        plain = ((k.replace(".base_layer", ""), v) for k, v in net.state_dict().items() if ".lora_" not in k)
        state = {k: v.cpu() for k, v in plain if torch.is_tensor(v)}
        for name, layer in net.named_modules():
            if (weight := quantization.dequantize(layer)) is not None:
                name = name.replace(".base_layer", "")
                for k in layer.state_dict():
                    if k != "bias":
                        state.pop(f"{name}.{k}", None)
                state[f"{name}.weight"] = weight.cpu()
        own = dict(self.named_parameters())
        for key, a in own.items():
            place, _, kind = key.rpartition(f"{SEP}lora_")
            if kind == "A":
                weight, b = place.replace(SEP, ".") + ".weight", own[f"{place}{SEP}lora_B"]
                state[weight] = (state[weight].to(b.dtype) + (b @ a).cpu()).to(state[weight].dtype)
        return state


def enable_gradient_checkpointing(net: nn.Module) -> None:
    """Have a diffusers transformer keep only the inputs of its blocks and run the blocks again in the backward pass.

    A block runs again with the same parameters frozen as before (networks.no_param_grad), or the graphs of the two passes
    would differ.
    """

    def run(block: nn.Module, *args: Any) -> Any:
        flags = [p.requires_grad for p in block.parameters()]

        def again(*args: Any) -> Any:
            with set_requires_grad(block, flags):
                return block(*args)

        return checkpoint(again, *args, use_reentrant=False)

    diffusers_model: Any = net
    diffusers_model.enable_gradient_checkpointing(run)


@contextmanager
def set_requires_grad(net: nn.Module, flags: Sequence[bool]) -> Iterator[None]:
    """Inside, the parameters of `net` require gradients as `flags` say, one for each."""
    params = list(net.parameters())
    before = [p.requires_grad for p in params]

    def set_to(wanted: Sequence[bool]) -> None:
        for p, flag in zip(params, wanted, strict=True):
            p.requires_grad_(flag)

    set_to(flags)
    try:
        yield
    finally:
        set_to(before)
