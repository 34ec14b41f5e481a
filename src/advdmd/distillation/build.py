"""From a recipe to a run: teacher, data, trainable networks with their optimizers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from advdmd.algorithms.base import RATIO_TOLERANCE, ROUNDED_RATIO_TOLERANCE, DistillationModels, ExtraRewards
from advdmd.data.aspect_buckets import CachedData
from advdmd.data.loader import BatchConfig, DataSource, TrainingData
from advdmd.distillation.run_folder import run_fingerprint
from advdmd.models import devices, loading, networks
from advdmd.models.backbone import Backbone
from advdmd.models.images import to_uint8
from advdmd.models.lora_files import fuse, read_lora
from advdmd.models.quantization import import_bitsandbytes, quantize
from advdmd.models.qwen_image import QwenImage
from advdmd.models.sampler import decode
from advdmd.models.student_start import Start, read_start, start_student
from advdmd.models.target_time import TargetTime
from advdmd.recipes.recipe import Recipe
from advdmd.rewards.registry import load_scorer, parse_reward
from advdmd.training import checkpoint, distributed
from advdmd.training.learner import Learner
from advdmd.training.optimizer import OptimizerConfig, ParamGroup
from advdmd.types import ONE_RANK, Cond, Ranks


class Setup(NamedTuple):
    """A run that is ready to train: the teacher's backbone, the data, and the models of the recipe's algorithm."""

    backbone: Backbone
    data: TrainingData
    models: Any


def setup(r: Recipe, source: DataSource, ranks: Ranks = ONE_RANK) -> Setup:
    """Load a recipe's teacher on its device, its data and its models. With encoded data the text encoders stay on disk.

    Raises ValueError if something is missing, damaged or does not fit.
    """
    if r.uses_bitsandbytes:
        import_bitsandbytes()
    dtype = getattr(torch, r.base_dtype(ranks.world_size))
    backbone, _ = loading.load(r.teacher, encoders=source.needs_encoders, dtype=dtype, resolution=source.resolution)
    start = read_start(r.student, backbone, r.algorithm.sampler(), bool(r.lora_rank)) if r.student else None
    if r.teacher_lora:
        fuse(backbone.net, read_lora(r.teacher_lora, backbone.net))
    data = source.load(backbone, BatchConfig(r.prompts_per_step, r.algorithm.group_size, r.seed, ranks))
    device = devices.resolve_device(r.device)
    devices.check_dtype(device, r.base_dtype(ranks.world_size))
    if not r.uses_fsdp(ranks.world_size):  # otherwise it goes there in shards
        if r.base_bits < 32:
            quantize(backbone.blocks(backbone.net), r.base_bits, backbone.dtype, device)
        backbone.net.to(device)
    data = data._replace(null=data.null.to(device), sample_cond=data.sample_cond.to(device))
    return Setup(backbone, data, Builder(r, backbone, data.null, data.prompts, ranks, start).build())


def restore(run: Path, r: Recipe) -> tuple[Setup, int]:
    """A run's setup in the state of its newest checkpoint, and after how many iterations that is.

    The cache may have moved together with the run. Raises ValueError as `setup`, and if there is no checkpoint.
    """
    if isinstance(r.data, CachedData):
        r = replace(r, data=r.data.beside(run))
    source = r.data.open(r.teacher)
    ready = setup(replace(r, student=""), source)  # its weights are in the checkpoint
    learners = {k: m for k, m in ready.models._asdict().items() if isinstance(m, Learner)}
    state = r.algorithm.extra_state(ready.models)
    done = checkpoint.resume(run / "checkpoints", learners, state, run_fingerprint(r, source.plan), source.contents)
    if not done:
        raise ValueError(f"{run} holds no checkpoint yet: let advdmd train run on")
    return ready, done


@dataclass
class Builder:
    """algorithms.base.ModelBuilder: networks of a recipe, whole or as adapters on the teacher.

    null: the empty prompt [1]; prompts: what a batch's prompt indices mean, for rewards; start: what the student starts from,
    by default the teacher.
    """

    recipe: Recipe
    backbone: Backbone
    null: Cond
    prompts: Sequence[str] = ()
    ranks: Ranks = ONE_RANK
    start: Start | None = None

    def build(self) -> Any:
        """The models of the recipe's algorithm."""
        return self.recipe.algorithm.build(self)

    def teacher(self) -> networks.Teacher:
        """The frozen teacher under the recipe's guidance scale."""
        return networks.Teacher(self.backbone, self.recipe.guidance_scale, self.null)

    def student(self, *optimizers: str) -> Learner:
        """A copy of the teacher, trained by optimizers of the recipe ("dm", "policy")."""
        (net,), ema_net = self._copies("student")
        return self._student(net, ema_net, self._shard([net]), *optimizers)

    def distillation_models(self, num_steps: int, *optimizers: str) -> DistillationModels:
        """Teacher, a student of `num_steps` steps trained by the optimizers, its fake score and the discriminator."""
        r, backbone = self.recipe, self.backbone
        config = r.discriminator
        trunks = ["trunk"] if config.trunk == "own" else []
        (net, score, *trunk), ema_net = self._copies("student", "fake", *trunks)
        both = networks.make_fake_score_and_discriminator(
            self.backbone, config, r.seed, num_steps, self.null, score, trunk[0] if trunk else None
        )
        make_unsharded = self._shard([net, score, *trunk])
        groups = [
            ParamGroup(both.score.parameters()),
            ParamGroup(both.heads.parameters(), r.discriminator_lr_scale),
            ParamGroup([both.exit_embedding], r.exit_embedding_lr_scale),
        ]
        if both.trunk is not None:
            groups.append(ParamGroup(both.trunk.parameters(), r.trunk_lr_scale))

        def fake_velocity(x: Tensor, t: Tensor, cond: Cond, k: Tensor) -> Tensor:
            return backbone.velocity(both.score, x, t, both.with_exit_embedding(cond, k))

        return DistillationModels(
            teacher=self.teacher(),
            student=self._student(net, ema_net, make_unsharded, *optimizers),
            fake_score=Learner("fake_score", both, fake_velocity, {"main": (r.fake_score_optimizer, groups)}),
            discriminator=networks.Discriminator(self.backbone, both, config),
            discriminator_auc=torch.full((num_steps,), 0.5, device=self.null.embeds.device),
            extra_rewards=self._extra_rewards(),
            ratio_tolerance=self._ratio_tolerance(),
            ranks=self.ranks,
        )

    def target_time_student(self) -> tuple[Learner, Callable[..., Tensor]]:
        """A student (x, t, r, cond) that also takes a target time r [N], trained by "main"; and the same with EMA weights.

        With adapters there is no second time embedding: the one time that the network takes is t - r / 2, and the adapters
        reach the layers of its embedding too (2512.05150, its LoRA code).
        """
        r, backbone = self.recipe, self.backbone
        (net,), ema_net = self._copies("student", more_targets=backbone.time_embedding.layers)
        if ema_net is not None:

            def adapter(net: nn.Module, x: Tensor, t: Tensor, target: Tensor, cond: Cond) -> Tensor:
                return backbone.velocity(net, x, t - target / 2, cond)

            student = self._learner(net, lambda *args: adapter(net, *args), ema_net, None, {"main": r.dm_optimizer})
            return student, torch.no_grad()(lambda *args: adapter(ema_net, *args))
        torch.manual_seed(r.seed)
        target_net = TargetTime(net, backbone.time_embedding, copied=isinstance(self.backbone, QwenImage))

        def whole(net: TargetTime, x: Tensor, t: Tensor, target: Tensor, cond: Cond) -> Tensor:
            with net.targeting(target):
                return backbone.velocity(net, x, t, cond)

        student = self._learner(target_net, lambda *args: whole(target_net, *args), None, None, {"main": r.dm_optimizer})
        ema_copy = student.ema_copy(target_net)
        return student, torch.no_grad()(lambda *args: whole(ema_copy, *args))

    def _copies(self, *names: str, more_targets: Sequence[str] = ()) -> tuple[list[nn.Module], nn.Module | None]:
        """A trainable network for each name, the student's first; with adapters also one that holds its EMA.

        more_targets: layers that adapters reach beside the backbone's.
        """
        r = self.recipe
        every = [*names, "ema"] if r.lora_rank else names
        nets = networks.trainable_copies(
            self.backbone,
            every,
            r.lora_rank,
            r.seed,
            r.gradient_checkpointing,
            (*self.backbone.lora_targets, *more_targets),
            "inductor" if r.compiles(devices.resolve_device(r.device)) else "",
        )
        if self.start is not None:
            start_student(nets[0], self.start)
        return (nets[:-1], nets[-1]) if r.lora_rank else (nets, None)

    def _student(
        self,
        net: nn.Module,
        ema_net: nn.Module | None,
        make_unsharded: Callable[[], nn.Module] | None,
        *optimizers: str,
    ) -> Learner:
        configs = {name: self.recipe.optimizers[f"{name}_optimizer"] for name in optimizers}
        backbone = self.backbone
        return self._learner(net, lambda x, t, cond: backbone.velocity(net, x, t, cond), ema_net, make_unsharded, configs)

    def _learner(
        self,
        net: nn.Module,
        call: Callable[..., Tensor],
        ema_net: nn.Module | None,
        make_unsharded: Callable[[], nn.Module] | None,
        configs: dict[str, OptimizerConfig],
    ) -> Learner:
        return Learner(
            "student",
            net,
            call,
            {name: (config, [ParamGroup(net.parameters())]) for name, config in configs.items()},
            ema_decay=self.recipe.ema_decay,
            ema_net=ema_net,
            make_unsharded=make_unsharded,
            log_prefixes={"policy": "policy/"},
        )

    def _shard(self, nets: Sequence[nn.Module]) -> Callable[[], nn.Module] | None:
        """Where the recipe says so, shard teacher and networks over ranks; returns what makes a network that is not sharded."""
        r, backbone = self.recipe, self.backbone
        if not r.uses_fsdp(self.ranks.world_size):
            return None
        base: Any = backbone.net
        hybrid = r.fsdp_sharding == "hybrid"
        kind, config, device = type(base), base.config, devices.resolve_device(r.device)
        for net in nets:  # made on the CPU; each goes to the devices in shards
            distributed.fully_shard_(net.float(), backbone.blocks(net), backbone.dtype, device, hybrid)
        distributed.fully_shard_(backbone.net, backbone.blocks(backbone.net), backbone.dtype, device, hybrid)
        return lambda: kind.from_config(config).to(backbone.dtype).to(device).requires_grad_(False).eval()

    def _ratio_tolerance(self) -> float:
        r = self.recipe
        exact = r.base_dtype(self.ranks.world_size) == "float32" and not r.compiles(devices.resolve_device(r.device))
        return RATIO_TOLERANCE if exact else ROUNDED_RATIO_TOLERANCE

    def _extra_rewards(self) -> ExtraRewards | None:
        """The recipe's scorers on final images; they run on the CPU, whatever the device of the run."""
        if not self.recipe.rewards:
            return None
        scorers = [(weight, load_scorer(kind, folder)) for weight, kind, folder in map(parse_reward, self.recipe.rewards)]

        def rewards(x0: Tensor, index: Tensor | None) -> dict[str, tuple[float, Tensor]]:
            assert index is not None
            images = list(to_uint8(decode(self.backbone, x0)))
            texts = [self.prompts[int(i)] for i in index]
            return {scorer.name: (weight, scorer.score(images, texts).to(x0.device)) for weight, scorer in scorers}

        return rewards
