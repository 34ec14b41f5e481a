"""Qwen-Image through diffusers' own classes."""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advdmd.models.backbone import ATTENTION, Backbone, Module, Pipeline, TimeEmbedding
from advdmd.types import Cond, Json, moved

LORA_TARGETS = (*ATTENTION, "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")

CARD_NULL_PROMPT = " "
IMAGE_TOKENS = "<|vision_start|><|image_pad|><|vision_end|>"  # of a source image, in prompt templates


def pack(x: Tensor) -> Tensor:
    """Latents [N, C, H, W] -> tokens [N, H / 2 * W / 2, 4 C]: each a patch of 2 x 2, channels outermost."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """Inverse of `pack`: tokens [N, h / 2 * w / 2, 4 C] -> latents [N, C, h, w]."""
    n, _, d = tokens.shape
    return tokens.reshape(n, h // 2, w // 2, d // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, d // 4, h, w)


def _one_frame(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    if x.shape[2] > 1 or cache_x is not None:
        return type(self).forward(self, x, cache_x)
    (side, _, top, _, _, _), newest = self._padding, self.weight[:, :, -1]
    return F.conv2d(x[:, :, 0], newest, self.bias, self.stride[1:], (top, side))[:, :, None]


def use_2d_convs(vae: Module) -> Any:
    """Make a causal video autoencoder quick at images, in place, and return it.

    Of one frame its 3-d convolutions see two thirds of padding, so a 2-d convolution with the newest slice of the kernel is the
    same sum in half of the time (the whole autoencoder, tiny, on a CPU).
    """
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            module.forward = MethodType(_one_frame, module)
    return vae


class QwenImage(Backbone):
    """A QwenImagePipeline as a backbone, for latents of side `side`.

    Latents are [N, C, H, W] here, packed 2 x 2 for the transformer and a video of one frame for the autoencoder. null_prompt:
    the negative prompt of guidance, by default the model card's. Raises ValueError if the side is odd, or if the tokenizer does
    not fit the pipeline's prompt template.
    """

    def __init__(self, pipe: Pipeline, side: int = 128, null_prompt: str = CARD_NULL_PROMPT):
        head, self.template_tokens = pipe.prompt_template_encode.partition("{}")[0], pipe.prompt_template_encode_start_idx
        if (found := len(pipe.tokenizer(head.removesuffix(IMAGE_TOKENS)).input_ids)) != self.template_tokens:
            raise ValueError(
                f"the prompt template begins with {found} tokens of this tokenizer, the pipeline drops {self.template_tokens}"
            )
        self.pipe, self.vae, self.metadata = pipe, use_2d_convs(pipe.vae), {"side": side}
        self.null_prompt = null_prompt
        if null_prompt != CARD_NULL_PROMPT:
            self.metadata |= {"null_prompt": null_prompt}
        self.net: Module = pipe.transformer
        self.dtype = self.net.dtype  # asked once: with adapters of another type the library's answer would change
        self.pipeline_load_kwargs: Json = {}
        self.hidden_size, self.time_embedding = pipe.transformer.inner_dim, TimeEmbedding("time_text_embed", scale=1.0)
        self.lora_targets: tuple[str, ...] = LORA_TARGETS
        self.check_latent_size(side, side)
        self.latent_shape = (pipe.transformer.config.in_channels // 4, side, side)
        self.max_text_length = pipe.tokenizer_max_length

    def pipeline_call_kwargs(self, steps: int) -> Json:
        """`steps` steps and no guidance; the pipeline's own grid is the student's: equal steps before a static shift."""
        side = self.pipe.vae_scale_factor * self.latent_shape[-1]
        return {
            "num_inference_steps": steps,
            "true_cfg_scale": 1.0,
            "height": side,
            "width": side,
            "max_sequence_length": self.pipe.tokenizer_max_length,
        }

    def text_lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt in the pipeline's template, after its head."""
        texts = [self.pipe.prompt_template_encode.format(p) for p in prompts]
        return [len(ids) - self.template_tokens for ids in self.pipe.tokenizer(texts).input_ids]

    @property
    def encoders(self) -> list[nn.Module]:
        """The text encoder."""
        return [self.pipe.text_encoder]

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """[N, 2, L] token ids of the prompts in the pipeline's template, and their mask; padded to the longest."""
        tokenizer = self.pipe.tokenizer
        texts = [self.pipe.prompt_template_encode.format(p) for p in prompts]
        limit = self.pipe.tokenizer_max_length + self.template_tokens
        out = tokenizer(texts, max_length=limit, padding=True, truncation=True, padding_side="right", return_tensors="pt")
        return torch.stack([out.input_ids, out.attention_mask], 1)

    def encode_text(self, ids: Tensor) -> Cond:
        """Token ids and masks [N, 2, L] -> the last hidden states after the template's head, zero and masked after the
        prompt.

        There is no pooled embedding.
        """
        ids = ids[..., : int(ids[:, 1].sum(1).max())]
        tokens, mask = ids[:, 0], ids[:, 1]
        hidden = self.pipe.text_encoder.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        hidden, mask = hidden[:, self.template_tokens :], mask[:, self.template_tokens :]
        return Cond(hidden * mask[..., None].to(hidden.dtype), mask=mask)

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(s, dtype=z.dtype, device=z.device) for s in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return mean.reshape(1, -1, 1, 1), std.reshape(1, -1, 1, 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] -> latents [N, C, h, w], the posterior's mean."""
        z = self.vae.encode(pixels[:, :, None]).latent_dist.mean[:, :, 0]
        mean, std = self._statistics(z)
        return (z - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, h, w] -> images [N, 3, H, W] in [-1, 1]."""
        mean, std = self._statistics(latents)
        return self.vae.decode((latents * std + mean)[:, :, None], return_dict=False)[0][:, :, 0].clamp(-1, 1)

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """v = e - x0 at x [N, C, H, W], t [N]. The pipeline rounds 1000 t to the latents' dtype; so must training."""
        n, _, h, w = x.shape
        # Source images are further tokens, which are not denoised.
        images = [x] if cond.source is None else [x, *cond.source.unbind(1)]
        mask = None if cond.mask is None or bool(cond.mask.all()) else moved(cond.mask, x.device)
        out = net(
            hidden_states=torch.cat([pack(z.to(self.dtype)) for z in images], 1),
            timestep=(t * 1000).to(self.dtype) / 1000,
            encoder_hidden_states=cond.embeds.to(self.dtype),
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, z.shape[-2] // 2, z.shape[-1] // 2) for z in images]] * n,
            return_dict=False,
        )[0]
        return unpack(out[:, : h * w // 4].float(), h, w)

    def features(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond, indices: Sequence[int]) -> list[Tensor]:
        """Tokens [N, T, hidden_size] of the image x after each of the blocks `indices`; later blocks are not run."""
        tokens = x.shape[-2] * x.shape[-1] // 4
        return [f[:, :tokens] for f in super().features(net, x, t, cond, indices)]

    def apply_guidance(self, v: Tensor, v_null: Tensor, scale: float) -> Tensor:
        """Guidance of velocities [N, C, H, W] as the pipeline has it.

        The combination gets back the length of v, token by token.
        """
        h, w = v.shape[-2:]
        mine, null = pack(v), pack(v_null)
        both = null + scale * (mine - null)
        return unpack(both * (mine.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True)), h, w)

    def blocks(self, net: nn.Module) -> Sequence[nn.Module]:
        """The transformer's blocks, in order."""
        return list(net.get_submodule("transformer_blocks").children())
