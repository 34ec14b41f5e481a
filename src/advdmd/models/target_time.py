"""A velocity network that also takes a target time r, and predicts the average velocity from r to t (TwinFlow).

Its time embedding is emb(t) + emb2(r) (t - r): with r = t the pretrained network is unchanged, whatever emb2 is (2512.05150).
emb2 is built like the network's own embedding. SD3's has a part for the pooled text embedding, and so has its emb2.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Arguments = tuple[Any, ...]  # of a time embedding, times first
EMBEDDING = "time_text_embed"  # diffusers' name, in SD3 and in Qwen-Image
TIME_EMBEDDING_LAYERS = ("timestep_embedder.linear_1", "timestep_embedder.linear_2")  # which TwinFlow's adapters reach too
ZERO_TARGET_TIME = "standing"  # key of a file: the part of emb2(0) that is the same for all texts


def _on_time_embedding(net: nn.Module, change: Callable[[Arguments, Tensor], Tensor]) -> RemovableHandle:
    """Replace the embedding of the times by change(its arguments, embedding) in every pass until the handle is removed."""

    def hook(module: nn.Module, args: Arguments, out: Tensor) -> Tensor:
        return change(args, out)

    return net.get_submodule(EMBEDDING).register_forward_hook(hook)


class TargetTime(nn.Module):
    """Stands in for the transformer `net` and is called like it; the target time is r = 0 unless `targeting` sets another.

    scale: what the family multiplies times by before the transformer takes them. copied: emb2 starts as a copy of emb, as
    TwinFlow does for Qwen-Image, else from N(0, .02), as for SD3.5. Raises ValueError if the transformer has no time embedding
    of the known kind.
    """

    def __init__(self, net: nn.Module, scale: float, copied: bool = False):
        super().__init__()
        self.net, self.scale = net, scale
        if EMBEDDING not in dict(net.named_children()):
            raise ValueError(f"TwinFlow has no second time embedding for a {type(net).__name__}: use AdvDMD or DMD2")
        self.embed_target = copy.deepcopy(net.get_submodule(EMBEDDING))
        if not copied:
            for name, p in self.embed_target.named_parameters():
                p.data.copy_(torch.zeros(p.shape) if name.endswith("bias") else 0.02 * torch.randn(p.shape))
        self._r: Tensor | None = None

    @contextmanager
    def targeting(self, r: Tensor) -> Iterator[None]:
        """Passes inside have the target times r [N]."""
        self._r = r
        try:
            yield
        finally:
            self._r = None

    def forward(self, **inputs: object) -> object:
        r = self._r

        def change(args: Arguments, embedding: Tensor) -> Tensor:
            t = args[0] / self.scale
            target = torch.zeros_like(t) if r is None else r
            return embedding + self.embed_target(target * self.scale, *args[1:]) * (t - target)[:, None].to(embedding.dtype)

        handle = _on_time_embedding(self.net, change)
        try:
            return self.net(**inputs)
        finally:
            handle.remove()

    @torch.no_grad()
    def zero_target_state_dict(self) -> dict[str, Tensor]:
        """All that sampling needs of emb2, at r = 0: its time part [D], and the weights of its text part if there is one."""
        embed: Any = self.embed_target
        weight = next(embed.timestep_embedder.parameters())
        times = embed.timestep_embedder(embed.time_proj(weight.new_zeros(1).float()).to(weight.dtype))
        text = embed.text_embedder.state_dict() if hasattr(embed, "text_embedder") else {}
        return {ZERO_TARGET_TIME: times[0].clone()} | {f"text_embedder.{k}": v.clone() for k, v in text.items()}


def attach_zero_target(net: nn.Module, state: Mapping[str, Tensor], scale: float) -> None:
    """Make a plain transformer predict for r = 0 from now on, given its `zero_target_state_dict`.

    A state of time alone is an earlier version's, whose emb2 had no text part. Raises ValueError if the weights do not fit.
    """
    times, text = state[ZERO_TARGET_TIME], None
    if len(state) > 1:
        text = copy.deepcopy(net.get_submodule(f"{EMBEDDING}.text_embedder"))
        try:
            text.load_state_dict({k.removeprefix("text_embedder."): v for k, v in state.items() if k != ZERO_TARGET_TIME})
        except RuntimeError as e:
            raise ValueError(f"the second time embedding does not fit the transformer: {e}") from None

    def change(args: Arguments, out: Tensor) -> Tensor:
        added = times.to(out) if text is None else times.to(out) + text.to(out)(args[1])
        return out + (args[0] / scale)[:, None].to(out.dtype) * added

    _on_time_embedding(net, change)
