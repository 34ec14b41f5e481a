"""The players of a recipe: networks of the cast with their optimizers, and how the student will be sampled."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from advdmd.algorithms.advdmd import AdvDMD
from advdmd.algorithms.base import Bonus, Cast
from advdmd.algorithms.twinflow import Twin, TwinFlow
from advdmd.evaluation.metrics.named import load_scorer, parse_reward
from advdmd.look import to_bytes
from advdmd.models import cast, load
from advdmd.models.qwen_image import QwenImage
from advdmd.models.sampler import Sampling, decode
from advdmd.models.target_time import TargetTime
from advdmd.recipe import Recipe
from advdmd.rng import home
from advdmd.train import parallel
from advdmd.train.learner import Learner
from advdmd.types import ALONE, Cond, Team


def make_bonus(r: Recipe, backbone: Any, prompts: Sequence[str]) -> Bonus | None:
    """What a recipe pays beside the critic: its scorers, on final images as people would see them."""
    if not r.rewards:
        return None
    with torch.device("cpu"):  # where scorers live, whatever the device of the run
        paid = [(weight, load_scorer(kind, where)) for weight, kind, where in map(parse_reward, r.rewards)]

    def bonus(x0: Tensor, prompt: Tensor | None) -> dict[str, tuple[float, Tensor]]:
        assert prompt is not None
        images = list(to_bytes(decode(backbone, x0)))
        said = [prompts[int(i)] for i in prompt]
        with torch.device("cpu"):
            scores = {scorer.name: (weight, scorer.score(images, said)) for weight, scorer in paid}
        return {name: (weight, home(score)) for name, (weight, score) in scores.items()}

    return bonus


def make_cast(r: Recipe, backbone: Any, null: Cond, prompts: Sequence[str] = (), team: Team = ALONE) -> Cast:
    """The players of distribution matching: student, fake score and critic, whole networks or adapters on the teacher.

    `null`: the empty prompt's condition, for guidance; `prompts`: what a batch's prompt numbers mean, for further rewards.
    """
    how = (r.lora_rank, r.checkpointing)
    student, fake = cast.distillation(backbone, r.critic, r.seed, r.algorithm.steps, null, *how)
    plain = _spread(r, backbone, [student, fake.score] + [fake.trunk] * (fake.trunk is not None), team)
    velocity = backbone.velocity
    turns = {"match": (r.match, [(student.parameters(), 1.0)]), "policy": (r.policy, [(student.parameters(), 1.0)])}
    groups = [(fake.score.parameters(), 1.0), (fake.heads.parameters(), r.heads_rate), ([fake.exits], r.exits_rate)]
    if fake.trunk is not None:
        groups.append((fake.trunk.parameters(), r.trunk_rate))
    return Cast(
        teacher=cast.Teacher(backbone, r.guidance, null),
        student=Learner("student", student, lambda x, t, c: velocity(student, x, t, c), turns, r.ema, plain),
        fake=Learner("fake", fake, lambda x, t, c, k: velocity(fake.score, x, t, fake.told(c, k)), {"main": (r.fake, groups)}),
        critic=cast.Critic(backbone, fake, r.critic),
        auc=torch.full((r.algorithm.steps,), 0.5),
        bonus=make_bonus(r, backbone, prompts),
        team=team,
    )


def _spread(r: Recipe, backbone: Any, nets: Sequence[Any], team: Team) -> Callable[[], torch.nn.Module] | None:
    """Where the recipe says so, spread teacher and players over the processes; returns what makes a network that is not."""
    if not r.spread_over(team.size):
        return None
    kind, config, device = type(backbone.net), backbone.net.config, load.device_of(r.device)

    def plain() -> torch.nn.Module:
        with torch.device("cpu"):  # where it may be float32 at first
            net = kind.from_config(config).to(backbone.dtype)
        return net.to(device).requires_grad_(False).eval()

    for net in nets:  # made on the CPU; each goes to the devices in shares
        parallel.shard(net.float(), backbone.blocks(net), backbone.dtype, device)
    parallel.shard(backbone.net, backbone.blocks(backbone.net), backbone.dtype, device)
    return plain


def make_twin(r: Recipe, backbone: Any, null: Cond) -> Twin:
    """TwinFlow's one player: a copy of the teacher that also reads a target time, and the same with averaged weights."""
    if r.lora_rank:
        return _adapted_twin(r, backbone, null)
    (copied,) = cast.parts(backbone, ["student"], 0, r.seed, r.checkpointing)
    torch.manual_seed(r.seed)
    net = TargetTime(copied, backbone.time_scale, copied=isinstance(backbone, QwenImage))

    def call(x: Tensor, t: Tensor, target: Tensor, cond: Any) -> Tensor:
        with net.toward(target):
            return backbone.velocity(net, x, t, cond)

    student = Learner("student", net, call, {"main": (r.match, [(net.parameters(), 1.0)])}, ema=r.ema)
    mean = copy.deepcopy(net)
    _show_average(student, mean)

    @torch.no_grad()
    def average(x: Tensor, t: Tensor, target: Tensor, cond: Any) -> Tensor:
        with mean.toward(target):
            return backbone.velocity(mean, x, t, cond)

    return Twin(student, average, null)


def _show_average(student: Learner, net: torch.nn.Module) -> None:
    """Make the parameters of a network like the student's the student's averages, from now on."""
    for k, p in net.requires_grad_(False).named_parameters():
        p.data = student.ema[k]


def _adapted_twin(r: Recipe, backbone: Any, null: Cond) -> Twin:
    """With adapters TwinFlow has no second time embedding: the one time fed is t - r / 2 (2512.05150, its LoRA code)."""
    net, mean = cast.parts(backbone, ["student", "average"], r.lora_rank, r.seed, r.checkpointing)

    def through(role: torch.nn.Module, x: Tensor, t: Tensor, target: Tensor, cond: Any) -> Tensor:
        return backbone.velocity(role, x, t - target / 2, cond)

    turns = {"main": (r.match, [(net.parameters(), 1.0)])}
    student = Learner("student", net, lambda *at: through(net, *at), turns, ema=r.ema)
    _show_average(student, mean)
    return Twin(student, torch.no_grad()(lambda *at: through(mean, *at)), null)


def make_players(r: Recipe, backbone: Any, null: Cond, prompts: Sequence[str] = (), team: Team = ALONE) -> Cast | Twin:
    return make_twin(r, backbone, null) if isinstance(r.algorithm, TwinFlow) else make_cast(r, backbone, null, prompts, team)


def extra(players: Cast | Twin) -> dict[str, Tensor]:
    """Tensors beside the players that belong to a run's state."""
    return {"auc": players.auc} if isinstance(players, Cast) else {}


def student_sampling(r: Recipe) -> Sampling:
    """How a recipe's student wants to be sampled."""
    a = r.algorithm
    if isinstance(a, TwinFlow):
        return Sampling(steps=a.steps, eta=1.0, gap=a.gap)
    return Sampling(steps=a.steps, shift=a.shift, eta=a.eta if isinstance(a, AdvDMD) else 1.0)
