"""What a family of models must offer; everything above this file is the same for all of them."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from advdmd.types import Cond


class Features(Exception):
    """Raised by the last hook of a pass that wants block outputs only: the rest of the network need not run."""


class Backbone(Protocol):
    """One family of flow models, read from a diffusers pipeline folder: a new one is one file.

    Conversions to the house's convention (data at t = 0, v = e - x0, latents [N, C, H, W]) happen here and only here.
    """

    net: nn.Module  # the pipeline's own transformer: the teacher
    latent_shape: tuple[int, ...]
    token_width: int  # of the image tokens that blocks put out

    def tokenize(self, prompts: Sequence[str]) -> Tensor: ...
    def embed(self, ids: Tensor) -> Cond: ...
    def encode(self, pixels: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor: ...
    def features(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond, taps: Sequence[int]) -> list[Tensor]: ...
    def blocks(self, net: nn.Module) -> Sequence[nn.Module]: ...
