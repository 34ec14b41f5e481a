"""Adapters of several roles on one frozen base, and gradient checkpointing that remembers the role.

Switching adapters the libraries' way flips `requires_grad`, and checkpointing recomputes under whatever adapter is active when
gradients flow: both corrupt gradients without a word. Here a pass only changes the routing, and what is recomputed runs in
the role, and with the frozen parameters, that it first ran with.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from advdmd.models import quantization

SEP = "/"  # in an adapter's parameter names, for the dots that nn.Module does not allow


class _MergedLoraLinear(torch.autograd.Function):
    """x (W + B A)^T + bias, W frozen. The sum is made once a pass and kept for its backward, so a token pays for one product
    instead of three, two of them thin, which a network of tiny width feels most (benchmarks/iteration.py)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:  # pyright: ignore
        merged = torch.addmm(weight, b, a)
        ctx.save_for_backward(x, merged, a, b)
        return F.linear(x, merged, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, merged, a, b = ctx.saved_tensors
        down, told_a, told_b = ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        g, said = grad.flatten(0, -2), x.flatten(0, -2)
        grad_x = (g @ merged).view_as(x) if down else None
        # Rank x tokens, and no product of two transposed: thin ones are several times as quick that way on a CPU (docs/log.md).
        grad_a = (b.t().contiguous() @ g.t()) @ said if told_a else None
        grad_b = ((a @ said.t()) @ g).t() if told_b else None
        return grad_x, None, None, grad_a, grad_b


def _lora_forward(
    roles: "SharedBase", base: nn.Module, pairs: Mapping[str, tuple[nn.Parameter, nn.Parameter]], x: Tensor
) -> Tensor:
    """What peft's layer does without dropout and with a scale of 1, in the role of the moment. On a base of another type than
    the adapter the adapter's share is its own sum, or what is small in it would be rounded away beside the weight; it is in the
    type of what flows."""
    if not roles.now:
        return base(x)
    a, b = pairs[roles.now]
    if roles.now in roles.still:
        a, b = a.detach(), b.detach()
    if type(base) is nn.Linear and base.weight.dtype == x.dtype == a.dtype:
        if not torch.is_grad_enabled():
            return F.linear(x, torch.addmm(base.weight, b, a), base.bias)
        return _MergedLoraLinear.apply(x, base.weight, base.bias, a, b)
    out = base(x)
    return out + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)).to(out.dtype)


class SharedBase:
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
        with warnings.catch_warnings(), torch.device("cpu"):  # the same numbers on any device; each goes to its layer's
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            for name in names:
                inject_adapter_in_model(config, net, name)
        self.net, self.names, self.now, self.still = net, tuple(names), "", frozenset[str]()
        layers: list[Any] = [m for m in net.modules() if isinstance(m, BaseTunerLayer)]
        for layer in layers:
            pairs = {name: (layer.lora_A[name].weight, layer.lora_B[name].weight) for name in names}
            layer.forward = partial(_lora_forward, self, layer.base_layer, pairs)
        for key, p in net.named_parameters():
            if "lora_" in key:  # peft made them of the base's type, in which small steps would be lost
                p.data = p.data.float()
                p.requires_grad_(True)

    @contextmanager
    def playing(self, name: str, still: frozenset[str] | None = None) -> Iterator[None]:
        """Passes inside go through the adapter `name`, through the base alone if it is empty; the adapters of the roles
        `still` are constants, by default those that were."""
        before = self.now, self.still
        self.now, self.still = name, self.still if still is None else still
        try:
            yield
        finally:
            self.now, self.still = before

    def checkpoint(self, blocks: Sequence[nn.Module]) -> None:
        """Keep only what enters these blocks and run them again when gradients flow, as they ran: in their role, and with what
        was constant then."""

        def forward(run: Callable[..., Any], mine: Mapping[str, Sequence[nn.Parameter]], *args: Any, **kw: Any) -> Any:
            if not torch.is_grad_enabled():
                return run(*args, **kw)
            learning = [] if self.now in self.still else mine.get(self.now, [])
            given = (*args, *kw.values())
            named = lambda *a: run(*a[: len(args)], **dict(zip(kw, a[len(args) :], strict=True)))  # noqa: E731
            return _Recompute.apply(self, named, len(given), *given, *learning)

        for block in blocks:
            mine = {n: [p for k, p in block.named_parameters() if f".{n}." in k and "lora_" in k] for n in self.names}
            block.forward = partial(forward, block.forward, mine)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters, named by their place: "blocks.0.attn.to_q.lora_A"."""
        marked = ((k.partition(f".{name}.weight"), p) for k, p in self.net.named_parameters())
        return {head: p for (head, found, _), p in marked if found and ".lora_" in head}


class _Recompute(torch.autograd.Function):
    """run(*given), of which only what was given is kept: it runs once more when gradients flow, in the role of the first time.
    The last of `given` are the adapter's parameters, which `run` does not take but which get their gradients here; tensors in
    tuples or dicts (rotary embeddings) are constants.

    torch's own checkpointing keeps a record of every tensor inside, which costs more than the launches of a small block.
    """

    @staticmethod
    def forward(ctx: Any, roles: SharedBase, run: Callable[..., Any], n: int, *given: Any) -> Any:  # pyright: ignore
        ctx.set_materialize_grads(False)
        ctx.run, ctx.n, ctx.moment = run, n, partial(roles.playing, roles.now, roles.still)
        ctx.plain = [None if isinstance(x, Tensor) else x for x in given]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in given))
        return run(*given[:n])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        asked = ctx.needs_input_grad[3:]
        kept = [plain if x is None else x for x, plain in zip(ctx.saved_tensors, ctx.plain, strict=True)]
        given, learning = kept[: ctx.n], kept[ctx.n :]
        given = [x.detach().requires_grad_(a) if isinstance(x, Tensor) else x for x, a in zip(given, asked, strict=False)]
        with torch.enable_grad(), ctx.moment():
            out = ctx.run(*given)
        pairs = zip(out if isinstance(out, tuple) else (out,), grads, strict=True)
        both = [(y, g) for y, g in pairs if g is not None and y.requires_grad]
        leaves = [x for x, a in zip(given + learning, asked, strict=True) if a]
        found = iter(torch.autograd.grad([y for y, _ in both], leaves, [g for _, g in both], allow_unused=True))
        return None, None, None, *(next(found) if a else None for a in asked)


class LoraModel(nn.Module):
    """The base in one role: called like the transformer, but its parameters are the adapter's alone."""

    def __init__(self, roles: SharedBase, name: str):
        super().__init__()
        self._roles, self.name = (roles,), name  # in a tuple: the base is nobody's submodule
        for key, p in roles.parameters(name).items():
            self.register_parameter(key.replace(".", SEP), p)

    @property
    def roles(self) -> SharedBase:
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
            if (numbers := quantization.dequantize(layer)) is not None:
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


def enable_gradient_checkpointing(net: nn.Module) -> None:
    """Have a diffusers transformer keep only what enters its blocks and run them again when gradients flow.

    A block runs again with the same parameters frozen as before (models.cast.frozen), or the graphs of the two passes would
    differ.
    """

    def run(block: nn.Module, *args: Any) -> Any:
        were = [p.requires_grad for p in block.parameters()]

        def again(*args: Any) -> Any:
            with set_requires_grad(block, were):
                return block(*args)

        return checkpoint(again, *args, use_reentrant=False)

    enable: Any = net
    enable.enable_gradient_checkpointing(run)


@contextmanager
def set_requires_grad(net: nn.Module, flags: Sequence[bool]) -> Iterator[None]:
    """Which of a network's parameters enter a graph built inside."""
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
