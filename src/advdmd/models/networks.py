"""Who plays: teacher, student, fake score and critic, all made from one backbone."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from advdmd.models.backbone import Backbone
from advdmd.models.discriminator import DiscriminatorConfig, DiscriminatorHeads, scale_gradient
from advdmd.models.lora import LoraModel, SharedBase, enable_gradient_checkpointing, set_requires_grad
from advdmd.types import Cond


class Teacher:
    """A frozen network (the backbone's own unless `net` is given) under classifier-free guidance, as one double batch."""

    def __init__(self, backbone: Backbone, guidance: float, null: Cond, net: nn.Module | None = None):
        if guidance < 1:
            raise ValueError(f"guidance={guidance}: below 1 it would push away from the prompt; 1 turns guidance off")
        self.backbone, self.guidance, self.null = backbone, guidance, null
        self.net = backbone.net if net is None else net

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if self.guidance == 1:
            return self.backbone.velocity(self.net, x, t, cond)
        both = Cond.cat([cond, self.null[torch.zeros(len(x), dtype=torch.long)]])
        v, v_null = self.backbone.velocity(self.net, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return self.backbone.guide(v, v_null, self.guidance)


class FakeScoreAndDiscriminator(nn.Module):
    """The fake score and the critic (heads, and a trunk if it has its own): networks that learn from one loss.

    What the student sees at its first hop is blurred, at its last sharp: other distributions. So one fake score serves all
    hops but is told which, by a learned vector, zero at first, on the pooled text embedding (or on every token without one).
    """

    def __init__(self, score: nn.Module, heads: DiscriminatorHeads, hops: int, width: int, trunk: nn.Module | None = None):
        super().__init__()
        self.score, self.heads, self.trunk = score, heads, trunk
        self.exits = nn.Parameter(torch.zeros(hops, width))

    def told(self, cond: Cond, k: Tensor) -> Cond:
        """The condition [N] with the hops k [N] said beside it."""
        if cond.pooled is None:
            return replace(cond, embeds=cond.embeds + self.exits[k][:, None])
        return replace(cond, pooled=cond.pooled + self.exits[k])


class Discriminator:
    """(x, t, cond) -> logit, low on generated and high on real.

    Gradients reach the trunk only in two ways: the configured share of them while the critic learns, and all of them, with
    the networks frozen, when `follow` asks for the gradient in x (GAN back-propagation).
    """

    def __init__(self, backbone: Backbone, fake: FakeScoreAndDiscriminator, config: DiscriminatorConfig):
        self.backbone, self.fake, self.config = backbone, fake, config

    @property
    def _trunk(self) -> nn.Module:
        return {"own": self.fake.trunk, "fake": self.fake.score, "teacher": self.backbone.net}[self.config.trunk]

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        weight = self.config.gradient
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
            features = self.backbone.features(self._trunk, x, t, cond, self.fake.heads.taps)
        return self.fake.heads([scale_gradient(f, weight) for f in features])

    def follow(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The logit with its gradient in x; no parameter of trunk or heads receives any."""
        with no_param_grad(self._trunk), no_param_grad(self.fake.heads):
            return self.fake.heads(self.backbone.features(self._trunk, x, t, cond, self.fake.heads.taps))


@contextmanager
def no_param_grad(net: nn.Module) -> Iterator[None]:
    """No parameter of `net` enters a graph built inside."""
    if isinstance(net, LoraModel):
        constant = net.roles.playing(net.roles.now, net.roles.still | {net.name})
    else:
        constant = set_requires_grad(net, [False for _ in net.parameters()])
    with constant:
        yield


def trainable_copies(backbone: Backbone, names: Sequence[str], rank: int, seed: int, checkpointing: bool) -> list[nn.Module]:
    """A trainable network for each name, the teacher at first: full copies or, with a rank, adapters on the teacher itself,
    which stays as it was outside of them and is frozen either way."""
    backbone.net.requires_grad_(False).eval()
    if rank:
        roles = SharedBase(backbone.net, names, rank, backbone.lora_targets, seed)
        if checkpointing:
            roles.checkpoint(backbone.blocks(backbone.net))
        return [LoraModel(roles, name) for name in names]
    nets = [copy.deepcopy(backbone.net).requires_grad_(True) for _ in names]
    for net in nets if checkpointing else []:
        enable_gradient_checkpointing(net)
    return nets


def build_student_and_fake_score(
    backbone: Backbone,
    config: DiscriminatorConfig,
    seed: int,
    hops: int,
    null: Cond,
    rank: int = 0,
    checkpointing: bool = False,
) -> tuple[nn.Module, FakeScoreAndDiscriminator]:
    """Student, and fake score with the critic; its trunk, if it has one of its own, is one more network."""
    names = ["student", "fake"] + ["trunk"] * (config.trunk == "own")
    student, score, *trunk = trainable_copies(backbone, names, rank, seed, checkpointing)
    torch.manual_seed(seed)
    with torch.device("cpu"):  # the same numbers on any device
        heads = DiscriminatorHeads(backbone.token_width, config.taps(len(backbone.blocks(score))), config.hidden)
    told = null.embeds if null.pooled is None else null.pooled
    return student, FakeScoreAndDiscriminator(score, heads.to(torch.get_default_device()), hops, told.shape[-1], *trunk)
