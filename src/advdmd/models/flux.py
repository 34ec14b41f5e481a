"""FLUX.1 through diffusers' own classes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from advdmd import flow
from advdmd.models.backbone import ATTENTION, Module, Pipeline, block_outputs, kl_decode, kl_encode, scheduler_grid
from advdmd.models.qwen_image import pack, unpack
from advdmd.types import Cond, Json

TEXT_LENGTH = 512  # tokens of a prompt that T5 reads
CARD_GUIDANCE = 3.5  # of FLUX.1 dev's model card
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp")


class Flux:
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
        self.hidden_size, self.time_scale = pipe.transformer.inner_dim, 1.0
        self.lora_targets: tuple[str, ...] = ATTENTION + MLP
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

    def check_latent_size(self, height: int, width: int) -> None:
        """Raises ValueError if latents of this size cannot be packed."""
        if min(height, width) < 2 or height % 2 or width % 2:
            raise ValueError(f"latents of {height} x {width}: FLUX packs latents two by two, so their sides must be even")

    def text_lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt by T5."""
        return [len(ids) for ids in self.pipe.tokenizer_2(list(prompts)).input_ids]

    def scheduler_grid(self, steps: int) -> Tensor:
        """Times [steps + 1] from noise to data at which the stock pipeline samples."""
        equal = torch.linspace(1.0, 1 / steps, steps).tolist()
        return scheduler_grid(self.pipe, steps, (self.latent_shape[-1] // 2) ** 2, equal)

    @property
    def device(self) -> torch.device:
        """Of the transformer."""
        return next(self.net.parameters()).device

    @property
    def encoders(self) -> list[nn.Module]:
        """CLIP and T5."""
        return [self.pipe.text_encoder, self.pipe.text_encoder_2]

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """[N, 2, L] token ids: CLIP's and T5's, each padded to its full length; rows are filled up with zeros to one L, which
        `encode_text` cuts off again."""
        texts = list(prompts)
        ids = [
            t(texts, padding="max_length", max_length=n, truncation=True, return_tensors="pt").input_ids
            for t, n in zip((self.pipe.tokenizer, self.pipe.tokenizer_2), self._lengths, strict=True)
        ]
        return torch.stack([nn.functional.pad(i, (0, max(self._lengths) - i.shape[1])) for i in ids], 1)

    @property
    def _lengths(self) -> tuple[int, int]:
        return self.pipe.tokenizer_max_length, self.max_text_length

    def encode_text(self, ids: Tensor) -> Cond:
        """Token ids from `tokenize` -> T5's embeddings [N, text_length, D] and CLIP's pooled ones [N, P]."""
        clip, t5 = (ids[:, i, :n] for i, n in enumerate(self._lengths))
        pooled = self.pipe.text_encoder(clip).pooler_output
        return Cond(self.pipe.text_encoder_2(t5)[0], pooled)

    def encode(self, pixels: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] -> latents [N, C, h, w]."""
        return kl_encode(self.vae, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, h, w] -> images [N, 3, H, W] in [-1, 1]."""
        return kl_decode(self.vae, latents)

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
        return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(device, self.dtype)

    def apply_guidance(self, v: Tensor, v_null: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of velocities [N, C, H, W], for models that were not trained with a guidance scale."""
        return flow.guide(v, v_null, scale)

    def features(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond, indices: Sequence[int]) -> list[Tensor]:
        """Image tokens [N, T, hidden_size] after the blocks `indices`; later blocks are not run."""
        return [out[1].float() for out in block_outputs(net, self.blocks(net), indices, lambda: self.velocity(net, x, t, cond))]

    def blocks(self, net: nn.Module) -> Sequence[nn.Module]:
        """The transformer's blocks, in order: those with weights for each of text and image, then the joint ones."""
        parts = ("transformer_blocks", "single_transformer_blocks")
        return [block for part in parts for block in net.get_submodule(part).children()]
