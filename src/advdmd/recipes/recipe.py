"""A recipe is one frozen value: everything that decides a distillation run."""

from dataclasses import dataclass
from typing import Any, Literal

from advdmd.algorithms.base import Algorithm, Costs
from advdmd.data.loader import DataConfig
from advdmd.models.discriminator import DiscriminatorConfig
from advdmd.models.lora_files import parse_lora
from advdmd.rewards.registry import parse_reward, parse_scorer
from advdmd.training.optimizer import OptimizerConfig

# Far beyond any run: schedules are planned iteration by iteration, and a typo is refused rather than planned for hours.
MAX_ITERATIONS = 10**6


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation on prompts of one's own, every `eval_every` iterations.

    prompts: a text file, a line each, or anything else that `advdmd encode` reads; "": the data's own, if they have some.
    scorers: "NAME:FOLDER" and the other forms of rewards.registry; the first selects checkpoints. images: of each prompt.
    Raises ValueError on values out of range.
    """

    prompts: str = ""
    scorers: tuple[str, ...] = ()
    images: int = 1

    def __post_init__(self) -> None:
        kinds = [parse_scorer(text)[0] for text in self.scorers]
        if bool(self.prompts) != bool(kinds):
            raise ValueError(f"validation.prompts={self.prompts!r} and validation.scorers={self.scorers} need each other")
        if len(set(kinds)) < len(kinds) or self.images < 1:
            raise ValueError(
                f"validation.scorers={self.scorers}, validation.images={self.images}: a scorer once, at least 1 image"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a distillation run.

    Raises ValueError on values out of range, and on settings that do not go together.
    """

    teacher: str  # a shipped name, a pipeline folder or a hub id
    teacher_lora: str = ""  # FILE_OR_HUB_ID[:SCALE]: a style that is added to the teacher
    student: str = ""  # a few-step pipeline or a LoRA that the student starts from; by default the teacher
    algorithm: Algorithm[Any]
    guidance_scale: float  # of the teacher in distribution matching, >= 1
    iterations: int
    prompts_per_step: int = 8
    dm_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4)  # of the student, for distribution matching
    policy_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5)  # of the student, for the policy gradient
    fake_score_optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, betas=(0.0, 0.999))  # of fake score and discriminator
    discriminator_lr_scale: float = 3.0  # learning rate of the discriminator's heads, as a multiple of the fake score's
    trunk_lr_scale: float = 0.3  # the same of a trunk that is the discriminator's own
    exit_embedding_lr_scale: float = 5.0  # the same of the embedding of the step in the fake score
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    lora_rank: int = 0  # of each network's adapter on one shared teacher; 0: every network is a whole copy
    base_bits: Literal[4, 8, 32] = 32  # of a frozen base's weights in its blocks (bitsandbytes); 32: as dtype says
    fsdp: bool = False  # shard whole networks over torchrun's processes (FSDP2); otherwise each has a replica
    fsdp_sharding: Literal["full", "hybrid"] = "full"  # over all processes, or over those of a node, with replicas across nodes
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the frozen base and of a sharded network's passes
    device: Literal["auto", "cpu", "cuda", "mps"] = "cpu"  # auto: an NVIDIA GPU if there is one; mps: Apple's
    compile: Literal["auto", "blocks", "none"] = "auto"  # torch.compile of transformer blocks; auto: on a GPU
    gradient_checkpointing: bool = False  # keep only the inputs of blocks and run them twice: less memory, a forward more
    data: DataConfig
    ema_decay: float = 0.95
    seed: int = 0
    threads: int = 1  # two share the work of the miniature's networks badly: 1.35 times slower than one (docs/log.md)
    save_every: int = 60
    sample_every: int = 60  # iterations between sample grids; 0: only at the end
    eval_every: int = 0  # iterations between validations; the EMA with the best score is then the student. 0: none
    patience: int = 0  # validations without a better score after which the run ends early; 0: it never does
    rewards: tuple[str, ...] = ()  # "WEIGHT*NAME:FOLDER": scorers beside the discriminator in policy updates
    eval_images: int = 48  # of the miniature's validation, per task
    validation: ValidationConfig = ValidationConfig()

    def __post_init__(self) -> None:
        if self.guidance_scale < 1:
            raise ValueError(
                f"guidance_scale={self.guidance_scale}: below 1 it would push away from the prompt; 1 turns it off"
            )
        for name, most in (("iterations", MAX_ITERATIONS), ("prompts_per_step", 2**20), ("threads", 1024)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1 and at most {most:,}")
        for name in ("discriminator_lr_scale", "trunk_lr_scale", "exit_embedding_lr_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: a multiple of the fake score's learning rate, above 0")
        if self.teacher_lora:
            parse_lora(self.teacher_lora)
        if self.student and not self.algorithm.starts_from_student:
            raise ValueError(f"student={self.student}: {self.algorithm.name} starts from its teacher; use AdvDMD or DMD2")
        for text in self.rewards:
            parse_reward(text)
        if self.rewards and not self.algorithm.uses_extra_rewards:
            raise ValueError(f"rewards={self.rewards}: {self.algorithm.name} has no policy updates to use them in")
        if self.algorithm.needs_extra_rewards and not self.rewards:
            raise ValueError("algorithm.discriminator_reward_weight=0 leaves no reward: name one in rewards")
        self.check_world_size(1)
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank={self.lora_rank}: the rank of adapters, 0 for full fine-tuning")
        if self.fsdp and (self.lora_rank or not self.algorithm.supports_fsdp):
            raise ValueError("fsdp=true: shards the whole networks of AdvDMD and DMD2; adapters and TwinFlow are replicated")
        if self.fsdp_sharding == "hybrid" and not self.fsdp:
            raise ValueError("fsdp_sharding=hybrid: set fsdp=true too; adapters are replicated on all nodes anyway")
        if self.dtype != "float32" and not (self.lora_rank or self.fsdp):
            raise ValueError(f"dtype={self.dtype}: whole networks learn in float32; bfloat16 needs lora_rank or fsdp=true")
        if self.base_bits < 32 and not self.lora_rank:
            raise ValueError(f"base_bits={self.base_bits}: only a frozen base can be quantized: set lora_rank too")
        if self.fsdp and any(o.state_bits == 8 for o in self.optimizers.values()):
            raise ValueError(
                "fsdp=true: 8-bit optimizers (dm_optimizer.state_bits, policy_optimizer.state_bits, "
                "fake_score_optimizer.state_bits) cannot be sharded"
            )
        if self.eval_every and not (self.data.has_validation or self.validation.prompts):
            raise ValueError("eval_every: data of your own have no validation: name validation.prompts and validation.scorers")
        if self.validation.prompts and not self.eval_every:
            raise ValueError("validation.prompts: set eval_every, the iterations between validations")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be negative")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: a decay lies in [0, 1)")
        if self.patience < 0 or (self.patience and not self.eval_every):
            raise ValueError(
                f"patience={self.patience}: counts validations, so eval_every must be set; 0 turns early stopping off"
            )
        if min(self.save_every, self.sample_every, self.eval_every) < 0 or self.eval_images < 1:
            raise ValueError(
                f"save_every={self.save_every}, sample_every={self.sample_every}, eval_every={self.eval_every} count "
                f"iterations (0: only at the end, no validation); eval_images={self.eval_images} must be at least 1"
            )

    @property
    def batch(self) -> int:
        """Samples per iteration: prompts x samples per prompt."""
        return self.prompts_per_step * self.algorithm.group_size

    @property
    def optimizers(self) -> dict[str, OptimizerConfig]:
        """The optimizers by their keys."""
        return {
            "dm_optimizer": self.dm_optimizer,
            "policy_optimizer": self.policy_optimizer,
            "fake_score_optimizer": self.fake_score_optimizer,
        }

    def check_world_size(self, world_size: int) -> None:
        """Raises ValueError if an iteration's samples cannot be shared by so many ranks."""
        self.algorithm.check_batch(self.prompts_per_step, world_size)

    @property
    def uses_bitsandbytes(self) -> bool:
        """Whether the base or moments of Adam have 8 bits or less."""
        return min(self.base_bits, *(o.state_bits for o in self.optimizers.values())) < 32

    def uses_fsdp(self, world_size: int) -> bool:
        """Whether so many ranks shard whole networks."""
        return self.fsdp and world_size > 1

    def base_dtype(self, world_size: int) -> str:
        """The type the teacher is loaded in. Whole networks learn in float32: only sharded ones make passes in another type."""
        return "float32" if self.fsdp and world_size == 1 else self.dtype

    def compiles(self, device: str) -> bool:
        """Whether blocks are compiled on a device, "cpu" or "cuda"."""
        return self.compile == "blocks" or (self.compile == "auto" and device == "cuda")

    @property
    def costs(self) -> Costs:
        """Units of forward passes: a backward counts two; one with adapters, whose frozen base needs no weight gradients; one
        more where gradient checkpointing runs the blocks again.
        """
        backward = (1.0 if self.lora_rank else 2.0) + self.gradient_checkpointing
        d = self.discriminator
        return Costs(backward, max(d.feature_depths), d.trunk_gradient > 0)

    def forwards(self, iteration: int) -> dict[str, float]:
        """Forward passes per sample of an iteration by part."""
        return self.algorithm.forwards_per_sample(iteration, self.costs)

    @property
    def full_iteration(self) -> int:
        """The first of the iterations that make the most forward passes: one with all kinds of updates."""
        return max(range(self.iterations), key=lambda i: sum(self.forwards(i).values()))

    def forwards_until(self, iteration: int) -> float:
        """Forward passes per sample of all iterations before `iteration`: the compute by which runs are compared."""
        return sum(sum(self.forwards(i).values()) for i in range(iteration))
