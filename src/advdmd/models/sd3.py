"""SD3 and SD3.5 through diffusers' own classes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from advdmd import flow
from advdmd.models.backbone import ATTENTION, Backbone, Module, Pipeline, TimeEmbedding, padded_ids, scheduler_grid
from advdmd.types import Cond, Json

LORA_TARGETS = (*ATTENTION, "net.0.proj", "net.2")


class SD3(Backbone):
    """A StableDiffusion3Pipeline as a backbone.

    SD3 Medium, SD3.5 Medium and Large, and their miniatures.

    t5_length: the pipeline's max_sequence_length. SD3 attends to padding, so the text length is part of the function, and
    training must use exactly the length that sampling uses. Without a third encoder the pipeline feeds that many zeros. side:
    of the latents, by default the transformer's own. Raises ValueError if the transformer cannot take that side.
    """

    def __init__(self, pipe: Pipeline, t5_length: int = 256, side: int | None = None):
        self.pipe, self.t5_length, self.metadata = pipe, t5_length, {"t5_length": t5_length} | ({"side": side} if side else {})
        self.pipeline_load_kwargs: Json = {} if pipe.tokenizer_3 else {"text_encoder_3": None, "tokenizer_3": None}
        self.net: Module = pipe.transformer
        self.vae, self.dtype = pipe.vae, pipe.transformer.dtype
        self.tokenizers = [t for t in (pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3) if t is not None]
        self.hidden_size, self.time_embedding = pipe.transformer.inner_dim, TimeEmbedding("time_text_embed", scale=1000.0)
        self.lora_targets: tuple[str, ...] = LORA_TARGETS
        self.null_prompt = ""
        side = int(side or pipe.transformer.config.sample_size)
        self.check_latent_size(side, side)
        self.latent_shape = (pipe.transformer.config.in_channels, side, side)
        self.max_text_length = self._lengths[-1]

    def pipeline_call_kwargs(self, steps: int) -> Json:
        """A student's grid of `steps` steps and no guidance.

        The scheduler applies the time shift itself, so the grid is the one before it; its own would be another.
        """
        side = self.pipe.vae_scale_factor * self.latent_shape[-1]
        return {
            "sigmas": [round(float(t), 6) for t in flow.grid(steps)[:-1]],
            "guidance_scale": 1.0,
            "height": side,
            "width": side,
            "max_sequence_length": self.t5_length,
        }

    def check_latent_size(self, height: int, width: int) -> None:
        """Raises ValueError if the transformer cannot take latents of this size: its positions are learned up to a limit."""
        config, scale = self.pipe.transformer.config, self.pipe.vae_scale_factor
        patch, limit = config.patch_size, config.patch_size * config.pos_embed_max_size
        if height % patch or width % patch or max(height, width) > limit:
            raise ValueError(
                f"{scale * height} x {scale * width} pixels: this transformer takes images with sides of a multiple of "
                f"{scale * patch} up to {scale * limit}"
            )

    def scheduler_grid(self, steps: int) -> Tensor:
        """Times [steps + 1] from noise to data at which the stock pipeline samples."""
        side = self.latent_shape[-1] // self.pipe.transformer.config.patch_size
        return scheduler_grid(self.pipe, steps, side**2)

    @property
    def encoders(self) -> list[nn.Module]:
        """Both CLIP text encoders, and T5 if the pipeline has it."""
        found = [self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.text_encoder_3]
        return found[: len(self.tokenizers)]

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """[N, 2 or 3, L] token ids: both CLIP tokenizers', padded to their full length, and T5's, padded to `t5_length`; rows
        are filled up with zeros to one L, which `encode_text` cuts off again."""
        return padded_ids(self.tokenizers, self._lengths, prompts)

    def text_lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt by T5, or by CLIP where the pipeline has no T5."""
        return [len(ids) for ids in self.tokenizers[-1](list(prompts)).input_ids]

    @property
    def _lengths(self) -> list[int]:
        """Tokens each tokenizer pads to."""
        return [t.model_max_length for t in self.tokenizers[:2]] + [self.t5_length] * (len(self.tokenizers) - 2)

    def encode_text(self, ids: Tensor) -> Cond:
        """Token ids from `tokenize` -> the pipeline's prompt embeddings [N, L + t5_length, D] and pooled ones [N, P]."""
        rows = [ids[:, i, :n] for i, n in enumerate(self._lengths)]
        out = [e(row, output_hidden_states=True) for e, row in zip(self.encoders[:2], rows[:2], strict=True)]
        clip = torch.cat([o.hidden_states[-2] for o in out], -1)
        width = self.net.config.joint_attention_dim
        clip = nn.functional.pad(clip, (0, width - clip.shape[-1]))
        t5 = self.encoders[2](rows[2])[0] if len(rows) > 2 else clip.new_zeros(len(ids), self.t5_length, width)
        return Cond(torch.cat([clip, t5], 1), torch.cat([o.text_embeds for o in out], -1))

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """v = e - x0 at x [N, C, H, W], t [N]; SD3 takes t * 1000 and already points from data to noise."""
        cond = cond.to(self.dtype)
        return net(
            hidden_states=x.to(self.dtype),
            timestep=t * 1000,
            encoder_hidden_states=cond.embeds,
            pooled_projections=cond.pooled,
            return_dict=False,
        )[0].float()

    def blocks(self, net: nn.Module) -> Sequence[nn.Module]:
        """The transformer's blocks, in order."""
        return list(net.get_submodule("transformer_blocks").children())
