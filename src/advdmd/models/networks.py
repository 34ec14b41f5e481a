"""Teacher, fake score and discriminator as networks, and trainable copies of a teacher, whole or as adapters."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from advdmd.models.backbone import Backbone
from advdmd.models.compilation import compile_blocks
from advdmd.models.discriminator import DiscriminatorConfig, DiscriminatorHeads, scale_gradient
from advdmd.models.lora import LoraModel, SharedBase, enable_gradient_checkpointing, set_requires_grad
from advdmd.types import Cond


class Teacher:
    """A frozen velocity network under classifier-free guidance, both halves in one pass.

    (x [N, ...], t [N], cond [N]) -> v [N, ...].

    null: the empty prompt [1]. net: the network, by default the backbone's own. Raises ValueError if guidance_scale < 1.
    """

    def __init__(self, backbone: Backbone, guidance_scale: float, null: Cond, net: nn.Module | None = None):
        if guidance_scale < 1:
            raise ValueError(
                f"guidance_scale={guidance_scale}: below 1 it would push away from the prompt; 1 turns guidance off"
            )
        self.backbone, self.guidance_scale, self.null = backbone, guidance_scale, null
        self.net = backbone.net if net is None else net

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if self.guidance_scale == 1:
            return self.backbone.velocity(self.net, x, t, cond)
        both = cond.with_null(self.null)
        v, v_null = self.backbone.velocity(self.net, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return self.backbone.apply_guidance(v, v_null, self.guidance_scale)


class FakeScoreAndDiscriminator(nn.Module):
    """The fake score, the discriminator's heads and, if it has its own, the discriminator's trunk: they learn in one update.

    Predictions of the first step are blurred, of the last one sharp: other distributions. So one fake score serves all steps
    and is given the step k as a learned vector, zero at first, on the pooled text embedding (or on every token without one).
    width: of that embedding.
    """

    def __init__(self, score: nn.Module, heads: DiscriminatorHeads, num_steps: int, width: int, trunk: nn.Module | None = None):
        super().__init__()
        self.score, self.heads, self.trunk = score, heads, trunk
        device = next(heads.parameters()).device
        self.exit_embedding = nn.Parameter(torch.zeros(num_steps, width, device=device))

    def with_exit_embedding(self, cond: Cond, k: Tensor) -> Cond:
        """Conditions [N] with the embedding of the steps k [N] added."""
        if cond.pooled is None:
            return replace(cond, embeds=cond.embeds + self.exit_embedding[k][:, None])
        return replace(cond, pooled=cond.pooled + self.exit_embedding[k])


class Discriminator:
    """(x [N, ...], t [N], cond [N]) -> logit [N], low for generated and high for real images.

    Gradients reach the trunk in two ways only: the configured share of them while the discriminator learns, and all of them,
    with the networks frozen, in `generator_logit` (GAN back-propagation).
    """

    def __init__(self, backbone: Backbone, networks: FakeScoreAndDiscriminator, config: DiscriminatorConfig):
        self.backbone, self.networks, self.config = backbone, networks, config

    @property
    def _trunk(self) -> nn.Module:
        trunks = {"own": self.networks.trunk, "fake": self.networks.score, "teacher": self.backbone.net}
        trunk = trunks[self.config.trunk]
        assert trunk is not None
        return trunk

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        scale = self.config.trunk_gradient
        with torch.set_grad_enabled(torch.is_grad_enabled() and scale > 0):
            features = self.backbone.features(self._trunk, x, t, cond, self.networks.heads.feature_indices)
        return self.networks.heads([scale_gradient(f, scale) for f in features])

    def generator_logit(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The logit [N] with its gradient in x [N, ...]; no parameter of trunk or heads receives any."""
        heads = self.networks.heads
        with no_param_grad(self._trunk), no_param_grad(heads):
            return heads(self.backbone.features(self._trunk, x, t, cond, heads.feature_indices))


@contextmanager
def no_param_grad(net: nn.Module) -> Iterator[None]:
    """No parameter of `net` enters a graph built inside."""
    if isinstance(net, LoraModel):
        base = net.shared_base
        constant = base.active(base.active_adapter, base.frozen_adapters | {net.name})
    else:
        constant = set_requires_grad(net, [False for _ in net.parameters()])
    with constant:
        yield


def trainable_copies(
    backbone: Backbone,
    names: Sequence[str],
    lora_rank: int,
    seed: int,
    gradient_checkpointing: bool,
    lora_targets: Sequence[str] | None = None,
    compiled: str | Callable[..., object] = "",
) -> list[nn.Module]:
    """A trainable network for each name, equal to the teacher at first.

    A whole copy or, with a rank, an adapter on the teacher's `lora_targets`, by default the backbone's.

    The teacher itself stays as it is and is frozen either way. compiled: torch.compile's backend for all blocks, the teacher's
    too; "": none are compiled.
    """
    backbone.net.requires_grad_(False).eval()
    if lora_rank:
        shared = SharedBase(backbone.net, names, lora_rank, lora_targets or backbone.lora_targets, seed)
        if compiled:  # before checkpointing: what runs again is compiled, not what decides that it does
            compile_blocks(backbone.blocks(backbone.net), compiled)
        if gradient_checkpointing:
            shared.checkpoint(backbone.blocks(backbone.net))
        return [LoraModel(shared, name) for name in names]
    nets = [copy.deepcopy(backbone.net).requires_grad_(True) for _ in names]
    for net in nets if gradient_checkpointing else []:
        enable_gradient_checkpointing(net)
    for net in (backbone.net, *nets) if compiled else ():
        compile_blocks(backbone.blocks(net), compiled)
    return nets


def make_fake_score_and_discriminator(
    backbone: Backbone,
    config: DiscriminatorConfig,
    seed: int,
    num_steps: int,
    null: Cond,
    score: nn.Module,
    trunk: nn.Module | None,
) -> FakeScoreAndDiscriminator:
    """New heads and step embeddings [num_steps, D] around a fake score and, if there is one, a trunk.

    null: the empty prompt [1].
    """
    torch.manual_seed(seed)
    indices = config.feature_indices(len(backbone.blocks(score)))
    heads = DiscriminatorHeads(backbone.hidden_size, indices, config.hidden_size)  # on the CPU: the same numbers on any device
    width = (null.embeds if null.pooled is None else null.pooled).shape[-1]
    return FakeScoreAndDiscriminator(score, heads.to(null.embeds.device), num_steps, width, trunk)
