"""What an algorithm is given, and what it must offer."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from advdmd.rng import Rng
from advdmd.rollout import Velocity
from advdmd.types import ONE_RANK, Batch, Metrics, Ranks


class Trainable(Protocol):
    """A network with a part in the game: call it for a velocity, or hand it losses to descend."""

    def __call__(self, x: Tensor, t: Tensor, cond: Any) -> Tensor: ...
    def descend(self, losses: Iterable[Tensor], turn: str = "main") -> Metrics: ...


class Discriminator(Protocol):
    """The critic: a logit; `follow` also gives its gradient in x and none in any parameter."""

    def __call__(self, x: Tensor, t: Tensor, cond: Any) -> Tensor: ...
    def follow(self, x: Tensor, t: Tensor, cond: Any) -> Tensor: ...


# (x0 [N, ...], prompt [N]) -> name of the reward -> its weight and what it pays [N]
ExtraRewards = Callable[[Tensor, Tensor | None], dict[str, tuple[float, Tensor]]]


class DistillationModels(NamedTuple):
    """The players of distillation. The critic's heads learn with the fake score, in one descent."""

    teacher: Velocity
    student: Any  # Player
    fake: Any  # Player, also told the hops k [N] at which the images were seen
    critic: Discriminator
    auc: Tensor  # [K] running AUC of the critic at levels 1..K; changed in place, part of the run's state
    bonus: ExtraRewards | None = None  # further rewards of final images, if a recipe names some
    team: Ranks = ONE_RANK  # the processes that share a step's samples


class Algorithm(Protocol):
    """A frozen dataclass whose fields are its hyperparameters."""

    def iteration(self, cast: Any, batch: Batch, step: int, rng: Rng) -> Metrics: ...
