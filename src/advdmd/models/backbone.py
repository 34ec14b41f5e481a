"""What a family of models must offer; everything above this file is the same for all of them."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from advdmd.types import Cond

# What diffusers names the projections of joint attention, for text and for image.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class _LastBlockDone(Exception):
    """Raised by the last hook of a pass that wants block outputs only: the rest of the network need not run."""


def block_outputs(net: nn.Module, blocks: Sequence[nn.Module], taps: Sequence[int], run: Callable[[], object]) -> list[Any]:
    """What the blocks `taps` of `net` put out while `run()` walks it; what lies behind the last of them is not run."""
    found: dict[int, Any] = {}

    def keep(i: int) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            found[i] = out
            if i == max(taps):
                raise _LastBlockDone

        return hook

    handles = [blocks[i].register_forward_hook(keep(i)) for i in taps]
    try:
        with suppress(_LastBlockDone):
            run()
    finally:
        for h in handles:
            h.remove()
        _reshard(net)
    return [found[i] for i in taps]


def _reshard(net: nn.Module) -> None:
    """What a pass that ended early has left gathered of a network that is spread over processes (train.parallel)."""
    from torch.distributed.fsdp import FSDPModule  # a second of import, for those who learn

    if isinstance(net, FSDPModule) and not torch.is_grad_enabled():
        net.reshard()


def kl_encode(vae: Any, pixels: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1] -> latents of an AutoencoderKL, the posterior's mean."""
    z = vae.encode(pixels).latent_dist.mean
    return (z - vae.config.shift_factor) * vae.config.scaling_factor


def kl_decode(vae: Any, latents: Tensor) -> Tensor:
    """Its latents -> images [N, 3, H, W] in [-1, 1]."""
    z = latents / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(z, return_dict=False)[0].clamp(-1, 1)


class Backbone(Protocol):
    """One family of flow models, read from a diffusers pipeline folder: a new one is one file.

    Conversions to the house's convention (data at t = 0, v = e - x0, latents [N, C, H, W]) happen here and only here.
    """

    pipe: Any  # the diffusers pipeline it was read from
    net: nn.Module  # the pipeline's own transformer: the teacher
    vae: Any  # its autoencoder
    dtype: torch.dtype  # of its weights; velocities and features leave in float32
    latent_shape: tuple[int, ...]
    token_width: int  # of the image tokens that blocks put out
    time_scale: float  # what times are multiplied by before the transformer sees them
    lora_targets: tuple[str, ...]  # endings of the names of the linear layers that adapters are put on

    note: dict[str, Any]  # what must be known beside the pipeline to read it again (load.as_backbone)
    stock_load: dict[str, Any]  # what the stock pipeline must be told when it is loaded

    @property
    def encoders(self) -> Sequence[nn.Module]: ...
    def stock_call(self, steps: int) -> dict[str, Any]: ...  # and when it is called: a student's grid, guidance off

    def tokenize(self, prompts: Sequence[str]) -> Tensor: ...
    def embed(self, ids: Tensor) -> Cond: ...
    def encode(self, pixels: Tensor) -> Tensor: ...  # images [N, 3, H, W] in [-1, 1] -> latents
    def decode(self, latents: Tensor) -> Tensor: ...
    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor: ...
    def guide(self, v: Tensor, v_null: Tensor, scale: float) -> Tensor: ...
    def features(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond, taps: Sequence[int]) -> list[Tensor]: ...
    def blocks(self, net: nn.Module) -> Sequence[nn.Module]: ...
