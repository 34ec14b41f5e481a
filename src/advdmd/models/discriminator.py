"""The discriminator that is the reward: heads on the image tokens of a few blocks of a velocity network."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """`blocks`: which block outputs the heads read, as fractions of depth in (0, 1]; the pass stops at the last of them.

    `trunk`: whose blocks. "own" is a copy of the teacher that learns with the heads; "fake" follows the fake score as it
    learns (DMD2); "teacher" is frozen. `trunk_weight`: share of the critic's gradient that enters the fake score's trunk
    (DMD2 uses 1e-2 of the loss; 0 saves that backward pass). `hidden`: width of a head.
    """

    blocks: tuple[float, ...] = (0.25, 0.5)
    trunk: str = "fake"
    trunk_weight: float = 0.0
    hidden: int = 128

    def __post_init__(self) -> None:
        if not self.blocks or not all(0 < b <= 1 for b in self.blocks):
            raise ValueError(f"CriticConfig(blocks={self.blocks}): fractions of depth in (0, 1], at least one")
        if self.trunk not in ("own", "fake", "teacher"):
            raise ValueError(f"CriticConfig(trunk={self.trunk!r}): 'own', 'fake' or 'teacher'")
        if not 0 <= self.trunk_weight <= 1:
            raise ValueError(f"CriticConfig(trunk_weight={self.trunk_weight}): lies in [0, 1]")
        if self.trunk != "fake" and self.trunk_weight:
            raise ValueError(
                f"CriticConfig(trunk={self.trunk!r}, trunk_weight={self.trunk_weight}): only the fake score's trunk is shared; "
                "the teacher is frozen, a trunk of its own learns in full: leave trunk_weight at 0"
            )
        if self.hidden < 1:
            raise ValueError(f"CriticConfig(hidden={self.hidden}): a head needs at least one unit")

    @property
    def gradient(self) -> float:
        """Share of the critic's gradient that enters the trunk it reads."""
        return 1.0 if self.trunk == "own" else self.trunk_weight

    def taps(self, depth: int) -> list[int]:
        """Block indices for a network of `depth` blocks."""
        return sorted({max(0, round(b * depth) - 1) for b in self.blocks})


class DiscriminatorHead(nn.Module):
    """Tokens [N, T, W] -> one logit [N]: what is typical of the image and what is most striking in it."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.token = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.image = nn.Sequential(nn.SiLU(), nn.Linear(2 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.token(tokens)
        return self.image(torch.cat([h.mean(1), h.amax(1)], 1))[:, 0]


class DiscriminatorHeads(nn.Module):
    """The sum of one head per tapped block."""

    def __init__(self, width: int, taps: Sequence[int], hidden: int):
        super().__init__()
        self.taps = list(taps)
        self.heads = nn.ModuleList(DiscriminatorHead(width, hidden) for _ in taps)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.stack([h(f) for h, f in zip(self.heads, features, strict=True)]).sum(0)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: float) -> Tensor:  # type: ignore[override]
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        return grads[0] * ctx.weight, None


def scale_gradient(x: Tensor, weight: float) -> Tensor:
    """x unchanged; its gradient times `weight`."""
    return _Scale.apply(x, weight)
