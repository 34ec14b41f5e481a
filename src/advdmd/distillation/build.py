"""The players of a recipe: networks of the cast with their optimizers, and how the student will be sampled."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from advdmd.algorithms.advdmd import AdvDMD
from advdmd.algorithms.base import DistillationModels, ExtraRewards
from advdmd.algorithms.twinflow import TwinFlow, TwinFlowModels
from advdmd.data.aspect_buckets import BucketedCache
from advdmd.data.loader import TrainingData
from advdmd.distillation.batches import load_training_data
from advdmd.models import loading, networks
from advdmd.models.images import to_uint8
from advdmd.models.quantization import import_bitsandbytes, quantize
from advdmd.models.qwen_image import QwenImage
from advdmd.models.sampler import SamplerConfig, decode
from advdmd.models.target_time import TargetTime
from advdmd.recipes.recipe import Recipe
from advdmd.rewards.registry import load_scorer, parse_reward
from advdmd.rng import to_default_device
from advdmd.training import distributed
from advdmd.training.learner import Learner
from advdmd.types import ONE_RANK, Cond, Ranks


def build_extra_rewards(r: Recipe, backbone: Any, prompts: Sequence[str]) -> ExtraRewards | None:
    """What a recipe pays beside the critic: its scorers, on final images as people would see them."""
    if not r.rewards:
        return None
    with torch.device("cpu"):  # where scorers live, whatever the device of the run
        paid = [(weight, load_scorer(kind, where)) for weight, kind, where in map(parse_reward, r.rewards)]

    def bonus(x0: Tensor, prompt: Tensor | None) -> dict[str, tuple[float, Tensor]]:
        assert prompt is not None
        images = list(to_uint8(decode(backbone, x0)))
        said = [prompts[int(i)] for i in prompt]
        with torch.device("cpu"):
            scores = {scorer.name: (weight, scorer.score(images, said)) for weight, scorer in paid}
        return {name: (weight, to_default_device(score)) for name, (weight, score) in scores.items()}

    return bonus


def build_models(
    r: Recipe, backbone: Any, null: Cond, prompts: Sequence[str] = (), team: Ranks = ONE_RANK
) -> DistillationModels:
    """The players of distribution matching: student, fake score and critic, whole networks or adapters on the teacher.

    `null`: the empty prompt's condition, for guidance; `prompts`: what a batch's prompt numbers mean, for further rewards.
    """
    how = (r.lora_rank, r.checkpointing)
    student, fake = networks.build_student_and_fake_score(backbone, r.critic, r.seed, r.algorithm.steps, null, *how)
    plain = _apply_fsdp(r, backbone, [student, fake.score] + [fake.trunk] * (fake.trunk is not None), team)
    velocity = backbone.velocity
    turns = {"match": (r.match, [(student.parameters(), 1.0)]), "policy": (r.policy, [(student.parameters(), 1.0)])}
    groups = [(fake.score.parameters(), 1.0), (fake.heads.parameters(), r.heads_rate), ([fake.exits], r.exits_rate)]
    if fake.trunk is not None:
        groups.append((fake.trunk.parameters(), r.trunk_rate))
    return DistillationModels(
        teacher=networks.Teacher(backbone, r.guidance, null),
        student=Learner("student", student, lambda x, t, c: velocity(student, x, t, c), turns, r.ema, plain),
        fake=Learner("fake", fake, lambda x, t, c, k: velocity(fake.score, x, t, fake.told(c, k)), {"main": (r.fake, groups)}),
        critic=networks.Discriminator(backbone, fake, r.critic),
        auc=torch.full((r.algorithm.steps,), 0.5),
        bonus=build_extra_rewards(r, backbone, prompts),
        team=team,
    )


def _apply_fsdp(r: Recipe, backbone: Any, nets: Sequence[Any], team: Ranks) -> Callable[[], torch.nn.Module] | None:
    """Where the recipe says so, spread teacher and players over the processes; returns what makes a network that is not."""
    if not r.spread_over(team.size):
        return None
    kind, config, device = type(backbone.net), backbone.net.config, loading.resolve_device(r.device)

    def plain() -> torch.nn.Module:
        with torch.device("cpu"):  # where it may be float32 at first
            net = kind.from_config(config).to(backbone.dtype)
        return net.to(device).requires_grad_(False).eval()

    for net in nets:  # made on the CPU; each goes to the devices in shares
        distributed.fully_shard_(net.float(), backbone.blocks(net), backbone.dtype, device)
    distributed.fully_shard_(backbone.net, backbone.blocks(backbone.net), backbone.dtype, device)
    return plain


def build_twinflow(r: Recipe, backbone: Any, null: Cond) -> TwinFlowModels:
    """TwinFlow's one player: a copy of the teacher that also reads a target time, and the same with averaged weights."""
    if r.lora_rank:
        return _build_twinflow_adapters(r, backbone, null)
    (copied,) = networks.trainable_copies(backbone, ["student"], 0, r.seed, r.checkpointing)
    torch.manual_seed(r.seed)
    net = TargetTime(copied, backbone.time_scale, copied=isinstance(backbone, QwenImage))

    def call(x: Tensor, t: Tensor, target: Tensor, cond: Any) -> Tensor:
        with net.toward(target):
            return backbone.velocity(net, x, t, cond)

    student = Learner("student", net, call, {"main": (r.match, [(net.parameters(), 1.0)])}, ema=r.ema)
    mean = copy.deepcopy(net)
    _alias_ema(student, mean)

    @torch.no_grad()
    def average(x: Tensor, t: Tensor, target: Tensor, cond: Any) -> Tensor:
        with mean.toward(target):
            return backbone.velocity(mean, x, t, cond)

    return TwinFlowModels(student, average, null)


def _alias_ema(student: Learner, net: torch.nn.Module) -> None:
    """Make the parameters of a network like the student's the student's averages, from now on."""
    for k, p in net.requires_grad_(False).named_parameters():
        p.data = student.ema[k]


def _build_twinflow_adapters(r: Recipe, backbone: Any, null: Cond) -> TwinFlowModels:
    """With adapters TwinFlow has no second time embedding: the one time fed is t - r / 2 (2512.05150, its LoRA code)."""
    net, mean = networks.trainable_copies(backbone, ["student", "average"], r.lora_rank, r.seed, r.checkpointing)

    def through(role: torch.nn.Module, x: Tensor, t: Tensor, target: Tensor, cond: Any) -> Tensor:
        return backbone.velocity(role, x, t - target / 2, cond)

    turns = {"main": (r.match, [(net.parameters(), 1.0)])}
    student = Learner("student", net, lambda *at: through(net, *at), turns, ema=r.ema)
    _alias_ema(student, mean)
    return TwinFlowModels(student, torch.no_grad()(lambda *at: through(mean, *at)), null)


def build(
    r: Recipe, backbone: Any, null: Cond, prompts: Sequence[str] = (), team: Ranks = ONE_RANK
) -> DistillationModels | TwinFlowModels:
    return (
        build_twinflow(r, backbone, null)
        if isinstance(r.algorithm, TwinFlow)
        else build_models(r, backbone, null, prompts, team)
    )


def extra_state(players: DistillationModels | TwinFlowModels) -> dict[str, Tensor]:
    """Tensors beside the players that belong to a run's state."""
    return {"auc": players.auc} if isinstance(players, DistillationModels) else {}


def student_sampling(r: Recipe) -> SamplerConfig:
    """How a recipe's student wants to be sampled."""
    a = r.algorithm
    if isinstance(a, TwinFlow):
        return SamplerConfig(steps=a.steps, eta=1.0, gap=a.gap)
    return SamplerConfig(steps=a.steps, shift=a.shift, eta=a.eta if isinstance(a, AdvDMD) else 1.0)


def stage(
    r: Recipe, encoded: BucketedCache | None, team: Ranks = ONE_RANK
) -> tuple[Any, TrainingData, DistillationModels | TwinFlowModels]:
    """Load a recipe's teacher on its device, its data and its players. With a cache, text encoders stay on disk."""
    if r.few_bits:
        import_bitsandbytes()
    with torch.device("cpu"):  # where all but the transformer stays
        size = encoded.resolution if encoded else None
        dtype = getattr(torch, r.base_dtype(team.size))
        backbone, _ = loading.load(r.teacher, encoders=not encoded, dtype=dtype, resolution=size)
        if encoded is None and not loading.is_mini_pipeline(backbone):
            raise ValueError(f"teacher={r.teacher} is not of the miniature: it needs data.folder, from advdmd encode")
        data = load_training_data(r, backbone, encoded, team)
    device = loading.resolve_device(r.device)
    if not r.spread_over(team.size):  # it goes there in shares
        if r.base_bits < 32:
            quantize(backbone.blocks(backbone.net), r.base_bits, backbone.dtype, device)
        backbone.net.to(device)
    data = data._replace(null=data.null.to(device), look=data.look.to(device))
    return backbone, data, build(r, backbone, data.null, data.prompts, team)
