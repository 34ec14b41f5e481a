"""A recipe is one frozen value; overrides are dotted keys; unknown keys are errors; the resolved recipe is written down."""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal, cast

from advdmd.algorithms.advdmd import AdvDMD
from advdmd.algorithms.dmd2 import DMD2
from advdmd.algorithms.twinflow import TwinFlow
from advdmd.evaluation.metrics.named import parse_reward
from advdmd.models.critic import CriticConfig
from advdmd.train.learner import Optim
from advdmd.types import Team

# Far beyond any run: schedules are planned step by step, and a slip of the hand is refused rather than planned for hours.
MOST_ITERATIONS = 10**6


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run trains on: `prompts` of the miniature's world with `reals` images each."""

    world: Literal["full", "half"] = "half"
    prompts: int = 1600
    reals: int = 4

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.reals < 1:
            raise ValueError(f"Data(prompts={self.prompts}, reals={self.reals}): both must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Cached:
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
    match: Optim = Optim(lr=1e-4)
    policy: Optim = Optim(lr=1e-5)
    fake: Optim = Optim(lr=2e-4, betas=(0.0, 0.999))
    heads_rate: float = 3.0  # learning rate of the critic's heads, as a multiple of the fake score's
    trunk_rate: float = 0.3  # the same for a trunk that is the critic's own
    exits_rate: float = 5.0  # the same for the vectors that tell the fake score the hop
    critic: CriticConfig = CriticConfig()
    lora_rank: int = 0  # of each player's adapter on one shared teacher; 0: every player is a whole network
    base_bits: Literal[4, 8, 32] = 32  # of a frozen base's weights in its blocks (bitsandbytes); 32: as dtype says
    shard: bool = False  # spread whole networks over torchrun's processes (FSDP2); otherwise each has a replica
    dtype: Literal["float32", "bfloat16"] = (
        "float32"  # of the frozen base, and of a sharded network's passes; what learns: float32
    )
    device: Literal["auto", "cpu", "cuda"] = "cpu"  # auto: a GPU if there is one
    checkpointing: bool = False  # keep only what enters the blocks and run them twice: less memory, a forward more
    data: Data | Cached = Data()
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
        if isinstance(self.data, Cached) and self.exam_every:
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
        Team(size=processes).share(self.prompts_per_step)
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


DEEP = 20  # levels of nesting that a recipe's text may have; recipes have three


def read_yaml(text: str) -> Any:
    """Plain YAML: no tags, anchors or aliases, which a recipe needs none of and which can run wild. Raises ValueError."""
    import yaml

    class Plain(yaml.SafeLoader):
        depth = 0

        def compose_node(self, *at: Any) -> Any:
            event: Any = self.peek_event()
            if event.anchor or getattr(event, "tag", None):
                raise yaml.YAMLError("a recipe has no tags, anchors or aliases")
            if self.depth == DEEP:
                raise yaml.YAMLError(f"nested more than {DEEP} deep")
            self.depth += 1
            node = super().compose_node(*at)
            self.depth -= 1
            return node

    try:
        return yaml.load(text, Plain)
    except (yaml.YAMLError, ValueError, OverflowError) as e:  # dates and numbers that are none are not YAMLErrors
        raise ValueError(str(e)) from None


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """["a.b=c"] -> {"a.b": c}, values read as YAML. Raises ValueError on a word without "="."""
    out = {}
    for word in words:
        key, eq, value = word.partition("=")
        if not eq or not key:
            raise ValueError(f"override {word!r}: write key=value, for example algorithm.steps=2")
        try:
            out[key] = read_yaml(value)
        except ValueError:
            raise ValueError(f"override {word!r}: {value!r} is not a value (number, text, true, [list])") from None
    return out


def flatten(tree: Mapping[str, Any], head: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for k, v in tree.items():
        out |= flatten(v, f"{head}{k}.") if isinstance(v, Mapping) else {f"{head}{k}": v}
    return out


def override(value: Any, changes: Mapping[str, Any], path: str = "") -> Any:
    """A copy of a frozen dataclass with dotted keys replaced, types checked. Raises ValueError naming key and rule."""
    from pydantic import TypeAdapter, ValidationError

    names = {f.name: f for f in fields(value)}
    new: dict[str, Any] = {f: getattr(value, f) for f in names}
    inner: dict[str, dict[str, Any]] = {}
    for key, v in changes.items():
        head, _, rest = key.partition(".")
        if head not in names:
            near = difflib.get_close_matches(head, names, 1)
            hint = f" Did you mean {path}{near[0]}?" if near else ""
            raise ValueError(f"unknown key {path}{key}.{hint} {type(value).__name__} has: {', '.join(names)}")
        if rest:
            if not is_dataclass(new[head]):
                raise ValueError(f"key {path}{key}: {path}{head} is a plain value, not a group of settings")
            inner.setdefault(head, {})[rest] = v
        elif is_dataclass(new[head]):
            raise ValueError(f"key {path}{head} is a group of settings: write {path}{head}.NAME=value")
        else:
            if isinstance(v, bool) != (names[head].type is bool) or (isinstance(v, float) and not math.isfinite(v)):
                raise ValueError(f"{path}{head}={v!r}: expected a finite value of {names[head].type}")
            try:
                new[head] = TypeAdapter(cast(Any, names[head].type)).validate_python(v)
            except ValidationError as e:
                raise ValueError(f"{path}{head}={v!r}: {e.errors()[0]['msg'].lower()} ({names[head].type})") from None
    for head, rest in inner.items():
        new[head] = override(new[head], rest, f"{path}{head}.")
    return type(value)(**new)


def dump(name: str, recipe: Recipe) -> str:
    """The resolved recipe as YAML that `resolve` reads back to an equal value."""
    import yaml

    return yaml.safe_dump({"recipe": name, **json.loads(json.dumps(asdict(recipe)))}, sort_keys=False)


def differences(a: Recipe, b: Recipe) -> list[str]:
    """Lines "key: a -> b" for every setting in which two recipes differ."""
    fa, fb = flatten(asdict(a)), flatten(asdict(b))
    return [f"{k}: {fa.get(k)} -> {fb.get(k)}" for k in fa | fb if fa.get(k) != fb.get(k)]
