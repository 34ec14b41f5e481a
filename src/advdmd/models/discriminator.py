"""The discriminator's heads on the image tokens of a few blocks of a velocity network, and its configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """What the discriminator reads.

    feature_depths: which block outputs the heads read, as fractions of depth in (0, 1]; the pass stops at the last of them.
    trunk: whose blocks. "own" is a copy of the teacher that learns with the heads; "fake" is the fake score as it learns
    (DMD2); "teacher" is frozen. trunk_grad_scale in [0, 1]: share of the discriminator's gradient that enters the fake score's
    trunk (DMD2 uses 1e-2 of the loss; 0 saves that backward pass). hidden_size: width of a head.
    Raises ValueError on values out of range.
    """

    feature_depths: tuple[float, ...] = (0.25, 0.5)
    trunk: Literal["own", "fake", "teacher"] = "fake"
    trunk_grad_scale: float = 0.0
    hidden_size: int = 128

    def __post_init__(self) -> None:
        name = "DiscriminatorConfig"
        if not self.feature_depths or not all(0 < b <= 1 for b in self.feature_depths):
            raise ValueError(f"{name}(feature_depths={self.feature_depths}): fractions of depth in (0, 1], at least one")
        if self.trunk not in ("own", "fake", "teacher"):
            raise ValueError(f"{name}(trunk={self.trunk!r}): 'own', 'fake' or 'teacher'")
        if not 0 <= self.trunk_grad_scale <= 1:
            raise ValueError(f"{name}(trunk_grad_scale={self.trunk_grad_scale}): lies in [0, 1]")
        if self.trunk != "fake" and self.trunk_grad_scale:
            raise ValueError(
                f"{name}(trunk={self.trunk!r}, trunk_grad_scale={self.trunk_grad_scale}): only the fake score's "
                "trunk is shared; the teacher is frozen, an own trunk learns in full: leave trunk_grad_scale at 0"
            )
        if self.hidden_size < 1:
            raise ValueError(f"{name}(hidden_size={self.hidden_size}): a head needs at least one unit")

    @property
    def trunk_gradient(self) -> float:
        """Share of the discriminator's gradient that enters the trunk it reads, in [0, 1]."""
        return 1.0 if self.trunk == "own" else self.trunk_grad_scale

    def feature_indices(self, depth: int) -> list[int]:
        """Block indices in a network of `depth` blocks."""
        return sorted({max(0, round(b * depth) - 1) for b in self.feature_depths})


class DiscriminatorHead(nn.Module):
    """Tokens [N, T, width] -> a logit [N], from the mean and the maximum over tokens of `hidden_size` features each."""

    def __init__(self, width: int, hidden_size: int):
        super().__init__()
        n = hidden_size
        self.token = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n), nn.SiLU(), nn.Linear(n, n))
        self.image = nn.Sequential(nn.SiLU(), nn.Linear(2 * n, n), nn.SiLU(), nn.Linear(n, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.token(tokens)
        return self.image(torch.cat([h.mean(1), h.amax(1)], 1))[:, 0]


class DiscriminatorHeads(nn.Module):
    """One head per block of `feature_indices`: features [N, T, width] of each -> the sum of their logits [N]."""

    def __init__(self, width: int, feature_indices: Sequence[int], hidden_size: int):
        super().__init__()
        self.feature_indices = list(feature_indices)
        self.heads = nn.ModuleList(DiscriminatorHead(width, hidden_size) for _ in feature_indices)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.stack([h(f) for h, f in zip(self.heads, features, strict=True)]).sum(0)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0] * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x unchanged, any shape; its gradient times `scale`."""
    return _ScaleGradient.apply(x, scale)
