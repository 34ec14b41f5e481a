"""FLUX.1 through diffusers' own classes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from advdmd.models.backbone import ATTENTION, Backbone, Module, Pipeline, TimeEmbedding, padded_ids
from advdmd.models.qwen_image import pack, unpack
from advdmd.types import Cond, Json, moved

TEXT_LENGTH = 512  # tokens of a prompt that T5 reads
CARD_GUIDANCE = 3.5  # of FLUX.1 dev's model card
LORA_TARGETS = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp")


class Flux(Backbone):
    """A FluxPipeline as a backbone, for latents of side `side`.

    FLUX.1 dev takes its guidance scale as a number that it was trained with, in one pass: `guidance` here, and classifier-free
    guidance is off (a recipe's guidance_scale of 1). A model without that input, such as schnell, gets none. The pipeline
    attends to T5's padding, so every prompt has text_length tokens. Raises ValueError if the side is odd.
    """

    def __init__(self, pipe: Pipeline, side: int = 128, guidance: float = CARD_GUIDANCE, text_length: int = TEXT_LENGTH):
        self.pipe, self.vae = pipe, pipe.vae
        self.net: Module = pipe.transformer
        self.guidance = guidance if pipe.transformer.config.guidance_embeds else None
        self.metadata: Json = {"side": side, "text_length": text_length}
        if self.guidance is not None:
            self.metadata["embedded_guidance"] = guidance
        self.dtype = pipe.transformer.dtype
        self.pipeline_load_kwargs: Json = {}
        self.hidden_size, self.time_embedding = pipe.transformer.inner_dim, TimeEmbedding("time_text_embed", scale=1000.0)
        self.lora_targets: tuple[str, ...] = LORA_TARGETS
        self.null_prompt = ""
        self.check_latent_size(side, side)
        self.max_text_length = text_length
        self.latent_shape = (pipe.transformer.config.in_channels // 4, side, side)

    def pipeline_call_kwargs(self, steps: int) -> Json:
        """`steps` steps under the embedded guidance; the pipeline's own grid is the student's: equal steps before a static
        shift."""
        side = self.pipe.vae_scale_factor * self.latent_shape[-1]
        guidance = {} if self.guidance is None else {"guidance_scale": self.guidance}
        size = {"height": side, "width": side, "max_sequence_length": self.max_text_length}
        return {"num_inference_steps": steps, **guidance, **size}

    def text_lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt by T5."""
        return [len(ids) for ids in self.pipe.tokenizer_2(list(prompts)).input_ids]

    @property
    def encoders(self) -> list[nn.Module]:
        """CLIP and T5."""
        return [self.pipe.text_encoder, self.pipe.text_encoder_2]

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """[N, 2, L] token ids: CLIP's and T5's, each padded to its full length; rows are filled up with zeros to one L, which
        `encode_text` cuts off again."""
        return padded_ids((self.pipe.tokenizer, self.pipe.tokenizer_2), self._lengths, prompts)

    @property
    def _lengths(self) -> tuple[int, int]:
        return self.pipe.tokenizer_max_length, self.max_text_length

    def encode_text(self, ids: Tensor) -> Cond:
        """Token ids from `tokenize` -> T5's embeddings [N, text_length, D] and CLIP's pooled ones [N, P]."""
        clip, t5 = (ids[:, i, :n] for i, n in enumerate(self._lengths))
        pooled = self.pipe.text_encoder(clip).pooler_output
        return Cond(self.pipe.text_encoder_2(t5)[0], pooled)

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """v = e - x0 at x [N, C, H, W], t [N]. The pipeline rounds 1000 t to the latents' dtype; so must training."""
        n, _, h, w = x.shape
        out = net(
            hidden_states=pack(x.to(self.dtype)),
            timestep=(t * 1000).to(self.dtype) / 1000,
            guidance=None if self.guidance is None else torch.full((n,), self.guidance, device=x.device),
            pooled_projections=cond.to(self.dtype).pooled,
            encoder_hidden_states=cond.embeds.to(self.dtype),
            txt_ids=torch.zeros(cond.embeds.shape[1], 3, device=x.device, dtype=self.dtype),
            img_ids=self._positions(h // 2, w // 2, x.device),
            return_dict=False,
        )[0]
        return unpack(out.float(), h, w)

    def _positions(self, h: int, w: int, device: torch.device) -> Tensor:
        """[h w, 3]: 0, row and column of each image token."""
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        return moved(torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(self.dtype), device)

    def blocks(self, net: nn.Module) -> Sequence[nn.Module]:
        """The transformer's blocks, in order: those with weights for each of text and image, then the joint ones."""
        parts = ("transformer_blocks", "single_transformer_blocks")
        return [block for part in parts for block in net.get_submodule(part).children()]
