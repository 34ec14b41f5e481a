"""A velocity network that also reads a target time r, where the average velocity from t to r is asked for (TwinFlow).

emb(t) + emb2(r) (t - r): with r = t the pretrained network is unchanged, whatever emb2 is (2512.05150).
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def _hooked(net: nn.Module, change: Any) -> Any:
    """`change(timestep, embedding)` instead of the embedding of the times, for every pass until the handle is removed."""
    return net.get_submodule("time_text_embed").register_forward_hook(lambda module, args, out: change(args[0], out))


class TargetTime(nn.Module):
    """Stands in for the transformer `net` and is called like it; the target is r = 0 unless `toward` says otherwise.

    `scale`: what the family multiplies times by before the transformer sees them. `copied`: emb2 starts as a copy of emb, as
    TwinFlow does for Qwen-Image, else from N(0, .02), as for SD3.5.
    """

    def __init__(self, net: nn.Module, scale: float, copied: bool = False):
        super().__init__()
        self.net, self.scale = net, scale
        if "time_text_embed" not in dict(net.named_children()):
            raise ValueError(f"TwinFlow has no second time embedding for a {type(net).__name__}: use AdvDMD or DMD2")
        embed: Any = net.get_submodule("time_text_embed")
        self.embed_target = copy.deepcopy(embed.timestep_embedder)
        if not copied:
            for name, p in self.embed_target.named_parameters():
                drawn = torch.zeros(p.shape) if name.endswith("bias") else 0.02 * torch.randn(p.shape, device="cpu")
                p.data.copy_(drawn)  # the same numbers on any device
        self._r: Tensor | None = None

    @contextmanager
    def toward(self, r: Tensor) -> Iterator[None]:
        """Passes inside ask for the way to r [N]."""
        self._r = r
        try:
            yield
        finally:
            self._r = None

    def _target(self, r: Tensor) -> Tensor:
        embed: Any = self.net.get_submodule("time_text_embed")
        return self.embed_target(embed.time_proj(r * self.scale).to(next(self.embed_target.parameters()).dtype))

    def forward(self, **kw: Any) -> Any:
        r = self._r

        def change(timestep: Tensor, out: Tensor) -> Tensor:
            t = timestep / self.scale
            to = torch.zeros_like(t) if r is None else r
            return out + self._target(to) * (t - to)[:, None].to(out.dtype)

        handle = _hooked(self.net, change)
        try:
            return self.net(**kw)
        finally:
            handle.remove()

    @torch.no_grad()
    def standing(self) -> Tensor:
        """[D] what r = 0 adds to the embedding of t, per unit of t: all that sampling needs of emb2."""
        return self._target(torch.zeros(1))[0].clone()


def attach_zero_target(net: nn.Module, standing: Tensor, scale: float) -> None:
    """Make a plain transformer answer for r = 0 from now on, given what `standing` said."""
    _hooked(net, lambda timestep, out: out + (timestep / scale)[:, None].to(out.dtype) * standing.to(out))
