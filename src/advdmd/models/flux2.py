"""FLUX.2 klein and FLUX.2 dev through diffusers' own classes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from advdmd.models.backbone import (
    ATTENTION,
    Backbone,
    Module,
    Pipeline,
    TimeEmbedding,
    Tokenizer,
    block_outputs,
    chat_prompts,
    scheduler_grid,
)
from advdmd.models.flux import Flux
from advdmd.models.qwen_image import pack, unpack
from advdmd.types import Cond, Json, moved

TEXT_LENGTH = 512  # tokens of a prompt, its chat template included
CARD_GUIDANCE = 4.0  # of FLUX.2 dev's model card
LORA_TARGETS = (*ATTENTION, "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
LORA_TARGETS += ("to_qkv_mlp_proj", "attn.to_out")  # of the joint blocks


class Flux2(Backbone):
    """A Flux2KleinPipeline as a backbone, for latents of side `side`.

    The pipeline normalises latents in patches of 2 x 2, channel by channel; here they are [N, C, H, W] as elsewhere. It attends
    to the padding of prompts, so every prompt has text_length tokens. Raises ValueError if the side is odd.
    """

    text_layers: tuple[int, ...] = (9, 18, 27)  # of the text encoder, whose outputs are a prompt's embedding
    guidance: float | None = None  # that the transformer takes

    def __init__(self, pipe: Pipeline, side: int = 128, text_length: int = TEXT_LENGTH):
        self.pipe, self.vae = pipe, pipe.vae
        self.net: Module = pipe.transformer
        self.metadata: Json = {"side": side, "text_length": text_length}
        self.dtype = pipe.transformer.dtype
        self.pipeline_load_kwargs: Json = {}
        self.hidden_size, self.time_embedding = pipe.transformer.inner_dim, TimeEmbedding("time_guidance_embed", scale=1000.0)
        self.lora_targets: tuple[str, ...] = LORA_TARGETS
        self.null_prompt = ""
        self.check_latent_size(side, side)
        self.max_text_length = text_length
        self.latent_shape = (pipe.transformer.config.in_channels // 4, side, side)

    def pipeline_call_kwargs(self, steps: int) -> Json:
        """`steps` steps and no guidance; the pipeline's own grid is the student's: equal steps before a static shift."""
        side = self.pipe.vae_scale_factor * self.latent_shape[-1]
        size = {"height": side, "width": side, "max_sequence_length": self.max_text_length}
        return {"num_inference_steps": steps, "guidance_scale": 1.0, **size}

    def scheduler_grid(self, steps: int) -> Tensor:
        """Times [steps + 1] from noise to data at which the stock pipeline samples; its shift depends on `steps` too."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        tokens = (self.latent_shape[-1] // 2) ** 2
        equal = torch.linspace(1.0, 1 / steps, steps).tolist()
        return scheduler_grid(self.pipe, steps, tokens, equal, mu=compute_empirical_mu(tokens, steps))

    def text_lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt as a user's message."""
        return [len(ids) for ids in self._token_ids(prompts)["input_ids"]]

    @property
    def encoders(self) -> list[nn.Module]:
        """The text encoder."""
        return [self.pipe.text_encoder]

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """[N, 2, text_length] token ids of the prompts as a user's message, and their mask."""
        how = {"padding": "max_length", "max_length": self.max_text_length, "truncation": True, "return_tensors": "pt"}
        out = self._token_ids(prompts, **how)
        return torch.stack([out["input_ids"], out["attention_mask"]], 1)

    def _token_ids(self, prompts: Sequence[str], **how: object) -> Json:
        """Token ids and masks of the prompts in the chat template; how: of padding and what is returned."""
        return self.pipe.tokenizer(chat_prompts(self.pipe.tokenizer, prompts, enable_thinking=False), **how)

    def encode_text(self, ids: Tensor) -> Cond:
        """Token ids and masks [N, 2, L] -> outputs of three layers beside each other [N, L, 3 D]. There is no pooled one."""
        tokens, mask = ids[:, 0], ids[:, 1]
        out = self.pipe.text_encoder(input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return Cond(torch.cat([out.hidden_states[k] for k in self.text_layers], -1))

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of packed latents [1, 1, 4 C], like z."""
        bn = self.vae.bn
        std = (bn.running_var + self.vae.config.batch_norm_eps).sqrt()
        return bn.running_mean.to(z)[None, None], std.to(z)[None, None]

    def encode(self, pixels: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] -> latents [N, C, h, w], the posterior's mean."""
        z = self.vae.encode(pixels).latent_dist.mean
        mean, std = self._statistics(z)
        return unpack((pack(z) - mean) / std, *z.shape[-2:])

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, h, w] -> images [N, 3, H, W] in [-1, 1]."""
        mean, std = self._statistics(latents)
        z = unpack(pack(latents) * std + mean, *latents.shape[-2:])
        return self.vae.decode(z, return_dict=False)[0].clamp(-1, 1)

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """v = e - x0 at x [N, C, H, W], t [N]. The pipeline rounds 1000 t to the prompts' dtype; so must training."""
        h, w = x.shape[-2:]
        rows, columns, words = torch.arange(h // 2), torch.arange(w // 2), torch.arange(cond.embeds.shape[1])
        zero = torch.zeros(1, dtype=torch.long)
        out = net(
            hidden_states=pack(x.to(self.dtype)),
            timestep=(t * 1000).to(self.dtype) / 1000,
            guidance=None if self.guidance is None else torch.full((len(x),), self.guidance, device=x.device),
            encoder_hidden_states=cond.embeds.to(self.dtype),
            txt_ids=moved(torch.cartesian_prod(zero, zero, zero, words), x.device),
            img_ids=moved(torch.cartesian_prod(zero, rows, columns, zero), x.device),
            return_dict=False,
        )[0]
        return unpack(out.float(), h, w)

    def features(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond, indices: Sequence[int]) -> list[Tensor]:
        """Image tokens [N, T, hidden_size] after each of the blocks `indices`; joint blocks hold them after the text's."""
        outputs = block_outputs(net, self.blocks(net), indices, lambda: self.velocity(net, x, t, cond))
        tokens = x.shape[-2] * x.shape[-1] // 4
        return [(o if isinstance(o, Tensor) else o[1])[:, -tokens:].float() for o in outputs]

    blocks = Flux.blocks


class Flux2Dev(Flux2):
    """A Flux2Pipeline as a backbone, for prompts without images.

    The transformer takes its guidance scale as a number that it was trained with, in one pass: `guidance` here, and
    classifier-free guidance is off (a recipe's guidance_scale of 1). The text encoder is a Mistral, with a system message.
    """

    text_layers = (10, 20, 30)

    def __init__(self, pipe: Pipeline, side: int = 128, text_length: int = TEXT_LENGTH, guidance: float = CARD_GUIDANCE):
        super().__init__(pipe, side, text_length)
        if pipe.transformer.config.guidance_embeds:
            self.guidance = self.metadata["embedded_guidance"] = guidance

    def pipeline_call_kwargs(self, steps: int) -> Json:
        """`steps` steps under the embedded guidance; the rest as klein's."""
        return super().pipeline_call_kwargs(steps) | {"guidance_scale": self.guidance or 1.0}

    def _token_ids(self, prompts: Sequence[str], **how: object) -> Json:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        messages = format_input(list(prompts), system_message=self.pipe.system_message)
        return self.pipe.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **how)


def chat_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in FLUX.2 dev's folder of a processor, which for prompts without images does what the processor does.

    transformers' own processor needs torchvision. Raises ValueError if the tokenizer cannot be loaded or has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise ValueError(f"{folder} holds no tokenizer that can be loaded: {e}") from None
    if not tokenizer.chat_template:
        raise ValueError(f"{folder} holds no chat template (chat_template.jinja), in which prompts are put: fetch it again")
    return tokenizer
