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

from advdmd.models.backbone import TimeEmbedding

Arguments = tuple[Any, ...]  # of a time embedding, times first


def _on_time_embedding(
    net: nn.Module, time: TimeEmbedding, change: Callable[[Tensor, Arguments, Tensor], Tensor]
) -> RemovableHandle:
    """Replace the embedding of times by change(t [N], its arguments, embedding) in every pass until the handle is removed."""

    def hook(module: nn.Module, args: Arguments, out: Tensor) -> Tensor:
        return change((args[0] - time.offset) / time.scale, args, out)

    return net.get_submodule(time.name).register_forward_hook(hook)


class TargetTime(nn.Module):
    """Stands in for the transformer `net` and is called like it; the target time is r = 0 unless `targeting` sets another.

    time: where the transformer embeds times. copied: emb2 starts as a copy of emb, as TwinFlow does for Qwen-Image, else from
    N(0, .02), as for SD3.5.
    """

    def __init__(self, net: nn.Module, time: TimeEmbedding, copied: bool = False):
        super().__init__()
        self.net, self.time = net, time
        self.embed_target = copy.deepcopy(net.get_submodule(time.name))
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

    def forward(self, *args: object, **inputs: object) -> object:
        r = self._r

        def change(t: Tensor, args: Arguments, embedding: Tensor) -> Tensor:
            target = torch.zeros_like(t)  # a source image's tokens may have times of their own after those of the samples: 0
            if r is not None:
                target = torch.cat([r.to(t), target[len(r) :]])
            embedded = self.embed_target(self.time.offset + target * self.time.scale, *args[1:])
            return embedding + embedded * (t - target)[:, None].to(embedding.dtype)

        handle = _on_time_embedding(self.net, self.time, change)
        try:
            return self.net(*args, **inputs)
        finally:
            handle.remove()

    @torch.no_grad()
    def zero_target_state_dict(self) -> dict[str, Tensor]:
        """What sampling needs beside the transformer, at r = 0: the weights of emb2."""
        return {k: v.clone() for k, v in self.embed_target.state_dict().items()}


def attach_zero_target(net: nn.Module, state: Mapping[str, Tensor], time: TimeEmbedding) -> None:
    """Make a plain transformer predict for r = 0 from now on, given its `zero_target_state_dict`.

    Raises ValueError if the weights do not fit.
    """
    embed = copy.deepcopy(net.get_submodule(time.name))
    try:
        embed.load_state_dict(state)
    except RuntimeError as e:
        raise ValueError(f"the second time embedding does not fit the transformer, export the student again: {e}") from None

    def change(t: Tensor, args: Arguments, out: Tensor) -> Tensor:
        return out + t[:, None].to(out.dtype) * embed.to(out)(torch.full_like(args[0], time.offset), *args[1:])

    _on_time_embedding(net, time, change)
