"""A recipe is one frozen value; overrides are dotted keys; unknown keys are errors; the resolved recipe is written down."""

from dataclasses import dataclass
from typing import Literal

from advdmd.algorithms.advdmd import AdvDMD
from advdmd.algorithms.dmd2 import DMD2
from advdmd.algorithms.twinflow import TwinFlow
from advdmd.models.discriminator import DiscriminatorConfig
from advdmd.rewards.registry import parse_reward
from advdmd.training.optimizer import OptimizerConfig
from advdmd.types import Ranks

# Far beyond any run: schedules are planned step by step, and a slip of the hand is refused rather than planned for hours.
MOST_ITERATIONS = 10**6


@dataclass(frozen=True, kw_only=True)
class MiniData:
    """What a run trains on: `prompts` of the miniature's world with `reals` images each."""

    world: Literal["full", "half"] = "half"
    prompts: int = 1600
    reals: int = 4

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.reals < 1:
            raise ValueError(f"Data(prompts={self.prompts}, reals={self.reals}): both must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CachedData:
    """Prompts and images of one's own: `folder` is what `advdmd encode` wrote."""

    folder: str = ""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a distillation run. `teacher` is a pipeline folder or a shipped name."""

    teacher: str
    algorithm: AdvDMD | DMD2 | TwinFlow
    guidance: float  # of the teacher, where distribution matching looks at it
    iterations: int
    prompts_per_step: int = 8
    match: OptimizerConfig = OptimizerConfig(lr=1e-4)
    policy: OptimizerConfig = OptimizerConfig(lr=1e-5)
    fake: OptimizerConfig = OptimizerConfig(lr=2e-4, betas=(0.0, 0.999))
    heads_rate: float = 3.0  # learning rate of the critic's heads, as a multiple of the fake score's
    trunk_rate: float = 0.3  # the same for a trunk that is the critic's own
    exits_rate: float = 5.0  # the same for the vectors that tell the fake score the hop
    critic: DiscriminatorConfig = DiscriminatorConfig()
    lora_rank: int = 0  # of each player's adapter on one shared teacher; 0: every player is a whole network
    base_bits: Literal[4, 8, 32] = 32  # of a frozen base's weights in its blocks (bitsandbytes); 32: as dtype says
    shard: bool = False  # spread whole networks over torchrun's processes (FSDP2); otherwise each has a replica
    dtype: Literal["float32", "bfloat16"] = (
        "float32"  # of the frozen base, and of a sharded network's passes; what learns: float32
    )
    device: Literal["auto", "cpu", "cuda"] = "cpu"  # auto: a GPU if there is one
    checkpointing: bool = False  # keep only what enters the blocks and run them twice: less memory, a forward more
    data: MiniData | CachedData = MiniData()
    ema: float = 0.95
    seed: int = 0
    threads: int = 1  # two share the work of these small networks badly: 1.35 times slower than one (docs/log.md)
    save_every: int = 60
    look_every: int = 60
    exam_every: int = 0  # iterations between scores on the miniature's held-out images; the best average is then the student
    patience: int = 0  # exams in a row without a better one after which the run ends early; 0: it never does
    rewards: tuple[str, ...] = ()  # "WEIGHT*NAME:FOLDER": scorers paid beside the critic in AdvDMD's policy turns
    exam_images: int = 48  # per short task, and as many dense ones in all

    def __post_init__(self) -> None:
        if self.guidance < 1:
            raise ValueError(f"guidance={self.guidance}: below 1 it would push away from the prompt; 1 turns it off")
        for name, most in (("iterations", MOST_ITERATIONS), ("prompts_per_step", 2**20), ("threads", 1024)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1 and at most {most:,}")
        for name in ("heads_rate", "trunk_rate", "exits_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: a multiple of the fake score's learning rate, above 0")
        for text in self.rewards:
            parse_reward(text)
        if self.rewards and not isinstance(self.algorithm, AdvDMD):
            raise ValueError(f"rewards={self.rewards}: only AdvDMD has policy turns to pay them in")
        self.check_shares(1)
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank={self.lora_rank}: the rank of adapters, 0 for full fine-tuning")
        if self.shard and (self.lora_rank or isinstance(self.algorithm, TwinFlow)):
            raise ValueError("shard=true: spreads the whole networks of AdvDMD and DMD2; adapters and TwinFlow are replicated")
        if self.dtype != "float32" and not (self.lora_rank or self.shard):
            raise ValueError(
                f"dtype={self.dtype}: whole networks learn in float32; adapters (lora_rank) and sharded runs can do with it"
            )
        if self.base_bits < 32 and not self.lora_rank:
            raise ValueError(f"base_bits={self.base_bits}: only a frozen base can do with it; set lora_rank too")
        if self.shard and any(o.bits == 8 for o in (self.match, self.policy, self.fake)):
            raise ValueError("shard=true: 8-bit optimizers (match.bits, policy.bits, fake.bits) cannot be spread")
        if isinstance(self.data, CachedData) and self.exam_every:
            raise ValueError(
                "exam_every: exams are the miniature's; with data of your own leave it at 0 and evaluate the student"
            )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be negative")
        if self.prompts_per_step < 2 and getattr(self.algorithm, "mismatch", 0):
            raise ValueError("algorithm.mismatch needs prompts_per_step of at least 2: a wrong caption is another prompt's")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema}: a decay lies in [0, 1)")
        if self.patience < 0 or (self.patience and not self.exam_every):
            raise ValueError(f"patience={self.patience}: counts exams, so exam_every must be set; 0 turns early stopping off")
        if self.save_every < 0 or self.look_every < 0 or self.exam_every < 0 or self.exam_images < 1:
            raise ValueError(
                f"save_every={self.save_every}, look_every={self.look_every}, exam_every={self.exam_every} count iterations "
                f"(0: only at the end, no exam); exam_images={self.exam_images} must be at least 1"
            )

    @property
    def batch(self) -> int:
        """Samples an iteration: prompts x samples per prompt."""
        return self.prompts_per_step * self.algorithm.group

    def check_shares(self, processes: int) -> None:
        """Raises ValueError if an iteration's samples cannot be those of so many processes."""
        Ranks(size=processes).share(self.prompts_per_step)
        if isinstance(self.algorithm, TwinFlow) and self.batch // processes % 4:
            raise ValueError(
                f"{self.batch} samples an iteration are {self.batch // processes} in each of {processes} processes: TwinFlow "
                "needs four equal quarters in each; set prompts_per_step or algorithm.group"
            )

    @property
    def few_bits(self) -> bool:
        """Whether it takes bitsandbytes: a base or moments of 8 bits or less."""
        return min(self.base_bits, *(o.bits for o in (self.match, self.policy, self.fake))) < 32

    def spread_over(self, processes: int) -> bool:
        """Whether so many processes share whole networks."""
        return self.shard and processes > 1

    def base_dtype(self, processes: int) -> str:
        """What the teacher is loaded in. Whole networks learn in float32: only those that are spread make passes in another
        type."""
        return "float32" if self.shard and processes == 1 else self.dtype

    def forwards(self, step: int) -> dict[str, float]:
        """Forwards per sample of iteration `step` by part: a backward counts two, one with adapters, whose frozen base needs
        no weight gradients, and one more where checkpointing runs the blocks again."""
        backward = (1.0 if self.lora_rank else 2.0) + self.checkpointing
        return self.algorithm.forwards(step, max(self.critic.blocks), backward, trunk=self.critic.gradient > 0)

    def forwards_until(self, step: int) -> float:
        """Forwards per sample of all iterations before `step`: the compute by which runs are compared."""
        return sum(sum(self.forwards(i).values()) for i in range(step))
