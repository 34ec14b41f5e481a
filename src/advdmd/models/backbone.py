"""What a family of flow models must offer. Everything above this file is the same for all families."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from advdmd import flow
from advdmd.types import Cond, Edit, Json

Pipeline = Any  # a pipeline of diffusers, whose annotations do not allow for absent parts
Tokenizer = Any  # a tokenizer or image processor of transformers
Module = Any  # a model of diffusers or transformers, whose outputs are not annotated

# diffusers' names for the projections of joint attention, for text and for image.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class _LastBlockDone(Exception):
    """Raised by the last hook of a pass that wants block outputs only: the rest of the network need not run."""


def block_outputs(net: nn.Module, blocks: Sequence[nn.Module], indices: Sequence[int], run: Callable[[], object]) -> list[Any]:
    """The outputs of the blocks `indices` of `net` in the pass `run()`, which ends after the last of them."""
    found: dict[int, Any] = {}

    def keep(i: int) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, out: object) -> None:
            found[i] = out
            if i == max(indices):
                raise _LastBlockDone

        return hook

    handles = [blocks[i].register_forward_hook(keep(i)) for i in indices]
    try:
        with suppress(_LastBlockDone):
            run()
    finally:
        for h in handles:
            h.remove()
        _reshard(net)
    return [found[i] for i in indices]


def _reshard(net: nn.Module) -> None:
    """Free what a pass that ended early has left gathered of a network that is sharded over ranks (training.distributed)."""
    from torch.distributed.fsdp import FSDPModule  # a second of import

    if isinstance(net, FSDPModule) and not torch.is_grad_enabled():
        net.reshard()


def padded_ids(tokenizers: Sequence[Tokenizer], lengths: Sequence[int], prompts: Sequence[str]) -> Tensor:
    """[N, number of tokenizers, L] token ids, each tokenizer's padded to its length; rows are filled up with zeros to one L."""
    ids = [
        t(list(prompts), padding="max_length", max_length=n, truncation=True, return_tensors="pt").input_ids
        for t, n in zip(tokenizers, lengths, strict=True)
    ]
    return torch.stack([nn.functional.pad(i, (0, max(lengths) - i.shape[1])) for i in ids], 1)


def chat_prompts(tokenizer: Tokenizer, prompts: Sequence[str], enable_thinking: bool) -> list[str]:
    """Prompts as a user's messages in a tokenizer's chat template, up to where the answer would begin."""
    how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": enable_thinking}
    return [tokenizer.apply_chat_template([{"role": "user", "content": p}], **how) for p in prompts]


def scheduler_grid(
    pipe: Pipeline, steps: int, tokens: int, sigmas: Sequence[float] | None = None, mu: float | None = None
) -> Tensor:
    """Times [steps + 1] from noise to data of a pipeline's own scheduler, with its own time shift.

    tokens: of the image, by which some schedulers shift: by `mu`, or by a line of the scheduler's. sigmas: times before the
    shift, where the pipeline has some of its own. Steps are Euler's, whatever solver the pipeline was saved with.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    c, more = scheduler.config, {}
    if c.use_dynamic_shifting:
        slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
        more["mu"] = c.base_shift + slope * (tokens - c.base_image_seq_len) if mu is None else mu
    if sigmas is None:
        scheduler.set_timesteps(steps, **more)
    else:
        scheduler.set_timesteps(sigmas=list(sigmas), **more)
    return scheduler.sigmas


class TimeEmbedding(NamedTuple):
    """Where a transformer embeds a time t in [0, 1]: the submodule `name` is given offset + scale * t first.

    layers: endings of the names of its linear layers for times, which TwinFlow's adapters reach too.
    """

    name: str
    scale: float
    offset: float = 0.0
    layers: tuple[str, ...] = ("timestep_embedder.linear_1", "timestep_embedder.linear_2")


class Backbone(Protocol):
    """One family of flow models, read from a diffusers pipeline folder. A new one is one file: a class that inherits this one.

    Conversions to this package's convention (data at t = 0, v = e - x0, latents [N, C, H, W]) happen here and only here. The
    methods with a body fit an AutoencoderKL, plain guidance, and blocks that return text and image tokens in this order.
    """

    pipe: Pipeline  # the diffusers pipeline it was read from
    net: nn.Module  # the pipeline's own transformer: the teacher
    vae: Module  # its autoencoder
    dtype: torch.dtype  # of the transformer's weights; velocities and features are returned in float32
    latent_shape: tuple[int, ...]  # [C, H, W]
    hidden_size: int  # of the image tokens that blocks return
    time_embedding: TimeEmbedding
    lora_targets: tuple[str, ...]  # endings of the names of the linear layers that adapters are put on
    null_prompt: str  # the negative prompt of guidance, by the model's card
    metadata: Json  # what must be known beside the pipeline to read it again (loading.backbone_from_pipeline)
    pipeline_load_kwargs: Json  # what the stock pipeline needs as arguments when it is loaded

    @property
    def encoders(self) -> Sequence[nn.Module]:
        """The text encoders."""
        ...

    @property
    def device(self) -> torch.device:
        """Of the transformer."""
        return next(self.net.parameters()).device

    def pipeline_call_kwargs(self, steps: int) -> Json:
        """What the stock pipeline needs as arguments when it is called: a student's grid, guidance off."""
        ...

    def scheduler_grid(self, steps: int) -> Tensor:
        """Times [steps + 1] from noise to data at which the stock pipeline samples: equal steps before its shift."""
        equal = torch.linspace(1.0, 1 / steps, steps).tolist()
        return scheduler_grid(self.pipe, steps, (self.latent_shape[-1] // 2) ** 2, equal)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids of N prompts [N, ...]."""
        ...

    max_text_length: int  # tokens of a prompt that the model reads

    def text_lengths(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens each prompt has, to compare with `max_text_length`: what is longer is cut."""
        ...

    def check_latent_size(self, height: int, width: int) -> None:
        """Raises ValueError if the transformer cannot take latents of this size: most read latents two by two."""
        if min(height, width) < 2 or height % 2 or width % 2:
            raise ValueError(f"latents of {height} x {width}: this transformer reads latents two by two, so sides must be even")

    def encode_text(self, ids: Tensor) -> Cond:
        """Token ids [N, ...] -> conditions [N]."""
        ...

    edits: bool = False  # whether prompts are about source images

    def encode_edits(self, edits: Sequence[Edit], height: int, width: int) -> Cond:
        """Prompts with their source images -> conditions [N] for images of this size in pixels, with `source` and `null`.

        Raises ValueError that names an image which cannot be read; for a model that edits no images always.
        """
        raise ValueError(f"{type(self.pipe).__name__} edits no images: give prompts without source images")

    def encode(self, pixels: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] -> latents [N, C, h, w], the posterior's mean."""
        z = self.vae.encode(pixels).latent_dist.mean
        return (z - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, h, w] -> images [N, 3, H, W] in [-1, 1]."""
        z = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(z, return_dict=False)[0].clamp(-1, 1)

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """v = e - x0 [N, C, H, W] by a transformer of this family, at x [N, C, H, W] and t [N] in [0, 1]."""
        ...

    def apply_guidance(self, v: Tensor, v_null: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of velocities [N, C, H, W] as the stock pipeline has it."""
        return flow.guide(v, v_null, scale)

    def features(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond, indices: Sequence[int]) -> list[Tensor]:
        """Image tokens [N, T, hidden_size] after each of the blocks `indices`; later blocks are not run."""
        return [out[1].float() for out in block_outputs(net, self.blocks(net), indices, lambda: self.velocity(net, x, t, cond))]

    def blocks(self, net: nn.Module) -> Sequence[nn.Module]:
        """The transformer's blocks, in order."""
        ...
