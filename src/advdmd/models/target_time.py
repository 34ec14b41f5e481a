"""A velocity network that also takes a target time r, and predicts the average velocity from r to t (TwinFlow).

Its time embedding is emb(t) + emb2(r) (t - r): with r = t the pretrained network is unchanged, whatever emb2 is (2512.05150).
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def _on_time_embedding(net: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> RemovableHandle:
    """Replace the embedding of the times by change(timestep, embedding) in every pass until the handle is removed."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return change(args[0], out)

    return net.get_submodule("time_text_embed").register_forward_hook(hook)


class TargetTime(nn.Module):
    """Stands in for the transformer `net` and is called like it; the target time is r = 0 unless `targeting` sets another.

    scale: what the family multiplies times by before the transformer takes them. copied: emb2 starts as a copy of emb, as
    TwinFlow does for Qwen-Image, else from N(0, .02), as for SD3.5. Raises ValueError if the transformer has no time embedding
    of the known kind.
    """

    def __init__(self, net: nn.Module, scale: float, copied: bool = False):
        super().__init__()
        self.net, self.scale = net, scale
        if "time_text_embed" not in dict(net.named_children()):
            raise ValueError(f"TwinFlow has no second time embedding for a {type(net).__name__}: use AdvDMD or DMD2")
        self.embed_target = copy.deepcopy(net.get_submodule("time_text_embed.timestep_embedder"))
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

    def _target(self, r: Tensor) -> Tensor:
        times = self.net.get_submodule("time_text_embed.time_proj")(r * self.scale)
        return self.embed_target(times.to(next(self.embed_target.parameters()).dtype))

    def forward(self, **inputs: object) -> object:
        r = self._r

        def change(timestep: Tensor, embedding: Tensor) -> Tensor:
            t = timestep / self.scale
            target = torch.zeros_like(t) if r is None else r
            return embedding + self._target(target) * (t - target)[:, None].to(embedding.dtype)

        handle = _on_time_embedding(self.net, change)
        try:
            return self.net(**inputs)
        finally:
            handle.remove()

    @torch.no_grad()
    def zero_target_embedding(self) -> Tensor:
        """What r = 0 adds to the embedding of t per unit of t, [D]: all that sampling needs of emb2."""
        return self._target(next(self.embed_target.parameters()).new_zeros(1).float())[0].clone()


def attach_zero_target(net: nn.Module, embedding: Tensor, scale: float) -> None:
    """Make a plain transformer predict for r = 0 from now on, given its `zero_target_embedding` [D]."""

    def change(timestep: Tensor, out: Tensor) -> Tensor:
        return out + (timestep / scale)[:, None].to(out.dtype) * embedding.to(out)

    _on_time_embedding(net, change)
