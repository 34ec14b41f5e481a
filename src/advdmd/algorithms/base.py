"""What an algorithm must offer, and what it is given: networks to build from, models to train, samples of a step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Protocol, Self, TypeVar, overload

from torch import Tensor, nn

from advdmd.models.sampler import SamplerConfig
from advdmd.rng import Rng
from advdmd.rollout import Velocity
from advdmd.types import ONE_RANK, Batch, Cond, Ranks, StepMetrics

RATIO_TOLERANCE = 1e-5  # of |ratio - 1| on replay, passes in fp32: more means that the trajectory is not the policy's own
ROUNDED_RATIO_TOLERANCE = 0.05  # the same of passes in bfloat16 or compiled, whose graphs with and without gradient round apart
ALL_SAMPLES = 2**20  # more than any iteration has
Aux = dict[str, Tensor]  # per-sample values [n] beside a loss, detached

# (x0 [N, ...], prompt index [N]) -> name of a reward -> (its weight, the reward [N])
ExtraRewards = Callable[[Tensor, Tensor | None], dict[str, tuple[float, Tensor]]]


class Trainable(Protocol):
    """A trainable network with its optimizers (training.learner.Learner).

    Called with x [N, ...], t [N] and conditions it predicts [N, ...]; `update` takes one optimizer step on the mean of losses
    [n], at `lr_scale` times the learning rate. `accumulate` adds the gradients of a rollout's two halves to those of earlier
    rollouts; `step_by_agreement` spends them in one step, as long as the halves agree.
    """

    net: nn.Module

    def __call__(self, x: Tensor, t: Tensor, /, *conditions: object) -> Tensor: ...
    @overload
    def update(self, losses: Iterable[Tensor], optimizer: str = "main", lr_scale: float = 1.0) -> StepMetrics: ...
    @overload
    def update(
        self, losses: Iterable[tuple[Tensor, Aux]], optimizer: str = "main", lr_scale: float = 1.0
    ) -> tuple[StepMetrics, Aux]: ...
    def accumulated_rollouts(self, optimizer: str) -> int: ...
    def accumulate(self, halves: Sequence[Iterable[tuple[Tensor, Aux]]], optimizer: str) -> tuple[StepMetrics, Aux]: ...
    def step_by_agreement(self, optimizer: str, scaled_by: str) -> StepMetrics: ...


class TargetTimeVelocity(Protocol):
    """(x [N, ...], t [N], r [N], cond [N]) -> the average velocity from r to t [N, ...]."""

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, cond: Cond, /) -> Tensor: ...


class Discriminator(Protocol):
    """(x [N, ...], t [N], cond [N]) -> logit [N], high for real images.

    `generator_logit` has a gradient in x and none in any weight.
    """

    def __call__(self, x: Tensor, t: Tensor, cond: Cond, /) -> Tensor: ...
    def generator_logit(self, x: Tensor, t: Tensor, cond: Cond, /) -> Tensor: ...


class DistillationModels(NamedTuple):
    """The models of AdvDMD and DMD2.

    The discriminator's heads, and its trunk if it has one, are part of the fake score's learner: both learn in one update.
    discriminator_auc [K]: running AUC of the discriminator at levels 1..K, changed in place, part of the run's state.
    ratio_tolerance > 0: of |ratio - 1| between a rollout and its replay with gradient, by how passes are rounded.
    """

    teacher: Velocity
    student: Trainable
    fake_score: Trainable  # also takes k [N], the steps at which the images were predicted
    discriminator: Discriminator
    discriminator_auc: Tensor
    extra_rewards: ExtraRewards | None = None
    ranks: Ranks = ONE_RANK
    ratio_tolerance: float = RATIO_TOLERANCE


class Costs(NamedTuple):
    """Units of `Algorithm.forwards_per_sample`: a forward pass without gradient of the whole network is 1.

    backward: 2 for whole networks, about 1 with adapters, 1 more with gradient checkpointing. discriminator_depth in (0, 1]:
    share of the network that the discriminator runs. discriminator_trunk: whether its gradient enters the trunk.
    """

    backward: float = 2.0
    discriminator_depth: float = 1.0
    discriminator_trunk: bool = False


class ModelBuilder(Protocol):
    """Makes the networks of a run from its teacher, whole or as adapters, with the recipe's optimizers (distillation.build)."""

    null: Cond  # the empty prompt [1]
    ranks: Ranks

    def teacher(self) -> Velocity:
        """The frozen teacher under the recipe's guidance scale."""
        ...

    def student(self, *optimizers: str) -> Trainable:
        """A copy of the teacher, trained by the recipe's optimizers: "dm" is dm_optimizer, "policy" is policy_optimizer."""
        ...

    def distillation_models(self, num_steps: int, *optimizers: str) -> DistillationModels:
        """Teacher, a student of `num_steps` steps trained by the optimizers, its fake score and the discriminator."""
        ...

    def target_time_student(self) -> tuple[Trainable, TargetTimeVelocity]:
        """A student (x, t, r, cond) that also takes a target time r [N], trained by "main", the dm_optimizer.

        And the same with EMA weights.
        """
        ...


Models = TypeVar("Models", bound=NamedTuple)


class Algorithm(Protocol[Models]):
    """A distillation algorithm: a frozen dataclass whose fields are its hyperparameters, validated in `__post_init__`.

    A new one is one file: a class that inherits this protocol, with `build`, `train_step`, `sampler` and `forwards_per_sample`,
    and one line that registers a recipe (recipes.registry.register). The other methods have defaults that fit an algorithm
    whose only trainable network is its student.
    """

    name: ClassVar[str]  # in tables, and the key of its healthy ranges
    starts_from_student: ClassVar[bool] = True  # whether its student may start from a few-step model
    supports_fsdp: ClassVar[bool] = True  # whether its whole networks can be sharded over ranks
    uses_extra_rewards: ClassVar[bool] = False  # whether it has policy updates that further rewards can enter
    steps: int  # of the student
    group_size: int  # samples of one prompt in a train step

    def build(self, builder: ModelBuilder) -> Models:
        """The models that `train_step` is given."""
        ...

    def train_step(self, models: Models, batch: Batch, iteration: int, rng: Rng) -> StepMetrics:
        """One iteration: the rollout and every update that is due.

        Draws are made by name (`rng.normal("rollout", shape)`), networks learn by `Learner.update` only. Branches depend on
        `iteration` alone, never on data, so that all ranks make the same passes.
        """
        ...

    def sampler(self) -> SamplerConfig:
        """How the trained student is sampled."""
        ...

    def forwards_per_sample(self, iteration: int, costs: Costs) -> dict[str, float]:
        """The forward passes that an iteration must make, per sample and part."""
        ...

    def extra_state(self, models: Models) -> Mapping[str, Tensor]:
        """Tensors [...] beside the networks that belong to the run's state; changed in place."""
        return {}

    def trained_networks(self, discriminator_trunk: bool) -> dict[str, Sequence[str]]:
        """Trainable networks and the optimizers of the recipe that train each; `discriminator_trunk`: whether there is one."""
        return {"student": ("dm_optimizer",)}

    def samples_per_pass(self, samples: int) -> int:
        """Samples per forward pass, if a rank has `samples` in an iteration."""
        return samples

    def optimizer_steps(self, iteration: int) -> Mapping[str, int]:
        """Optimizer steps of an iteration for each of `trained_networks`: how often gradients are exchanged."""
        return {"student": 1}

    @property
    def fits_passes_to_gpu(self) -> bool:
        """Whether the samples of a pass are still to be chosen, by what the GPU holds (distillation.micro_batch)."""
        return False

    def with_samples_per_pass(self, samples: int) -> Self:
        """The same with so many samples a pass, where they can be chosen."""
        return self

    @property
    def conditions_per_sample(self) -> int:
        """Conditions that a step holds per sample: 2 if each also has a mismatched caption."""
        return 1

    @property
    def variant(self) -> str:
        """What is behind name and steps in the key of its healthy ranges: empty for the form that they were measured on."""
        return ""

    @property
    def needs_extra_rewards(self) -> bool:
        """Whether further rewards are its only ones."""
        return False

    def check_batch(self, prompts: int, world_size: int) -> None:
        """Raises ValueError if a step's prompts cannot be divided among `world_size` ranks."""
        Ranks(world_size=world_size).local_slice(prompts)


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """The samples of a forward-backward pass, of algorithms that make several passes an optimizer step.

    No result depends on them. auto: as many as the GPU holds (distillation.micro_batch). Raises ValueError below 1.
    """

    micro_batch_size: int | Literal["auto"] = 64

    def __post_init__(self) -> None:
        if self.samples_of_a_pass < 1:
            raise ValueError(f"{type(self).__name__}(micro_batch_size={self.micro_batch_size}): must be at least 1")

    @property
    def samples_of_a_pass(self) -> int:
        """micro_batch_size as a number; all samples where the GPU has not said yet."""
        return ALL_SAMPLES if self.micro_batch_size == "auto" else self.micro_batch_size

    def samples_per_pass(self, samples: int) -> int:
        """At most micro_batch_size of `samples`."""
        return min(self.samples_of_a_pass, samples)

    @property
    def fits_passes_to_gpu(self) -> bool:
        """Whether micro_batch_size is auto."""
        return self.micro_batch_size == "auto"

    def with_samples_per_pass(self, samples: int) -> Self:
        """The same with so many samples a pass."""
        return replace(self, micro_batch_size=samples)
