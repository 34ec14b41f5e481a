"""The miniature's models: real diffusers and transformers classes with small numbers, built offline.

The same builders make the shipped teachers and the smaller ones in the tests.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from advdmd.models.backbone import Backbone, Module, Pipeline

IMAGE, LATENT, CHANNELS = 32, 8, 4  # pixels, latent side, latent channels: 256 numbers an image
QWEN_TEMPLATE = (  # the pipeline's own; its tokenizer must know it, for 34 tokens of it are dropped
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEXT_LENGTH = 25  # tokens, start and end included: the longest caption of the miniature


@dataclass(frozen=True, kw_only=True)
class MiniConfig:
    """Widths of a miniature pipeline.

    `width` and `text_width` are multiples of 32. Raises ValueError on values out of range.
    """

    width: int = 96
    layers: int = 4
    patch: int = 2
    text_width: int = 64
    text_layers: int = 1
    vae_channels: tuple[int, ...] = (16, 16, 32)

    def __post_init__(self) -> None:
        for name in ("width", "text_width"):
            if getattr(self, name) < 32 or getattr(self, name) % 32:
                raise ValueError(f"MiniConfig({name}={getattr(self, name)}): must be a positive multiple of 32, the head size")
        if LATENT % self.patch:
            raise ValueError(f"MiniConfig(patch={self.patch}): must divide the latent side {LATENT}")


def clip_tokenizer(corpus: Sequence[str]) -> Module:
    """A CLIPTokenizer whose byte-pair merges were learned on a closed vocabulary: every word of it is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    stock = CLIPTokenizer()  # lends its normaliser and pre-tokeniser
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = stock.backend_tokenizer.normalizer
    bpe.pre_tokenizer = stock.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<pad>", "<unk>", "<|endoftext|>"],  # CLIP's pooling breaks for an end id of 2
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    learned = json.loads(bpe.to_str())["model"]
    make: Module = CLIPTokenizer
    return make(vocab=learned["vocab"], merges=[tuple(m) for m in learned["merges"]], model_max_length=TEXT_LENGTH)


def _text_encoder(tokenizer: Any, size: MiniConfig) -> Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.text_width,
        intermediate_size=4 * size.text_width,
        num_attention_heads=size.text_width // 32,
        num_hidden_layers=size.text_layers,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=size.text_width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="gelu",
    )
    return CLIPTextModelWithProjection(config).eval()


def autoencoder(size: MiniConfig) -> Module:
    """A tiny AutoencoderKL, 32 x 32 x 3 -> 8 x 8 x 4, without attention; scale and shift are set after training."""
    from diffusers import AutoencoderKL

    n = len(size.vae_channels)
    make: Module = AutoencoderKL  # its annotations are narrower than what it takes
    return make(
        sample_size=IMAGE,
        block_out_channels=size.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    ).eval()


def sd3(corpus: Sequence[str], size: MiniConfig, *, sd35: bool, seed: int = 0, vae: Module = None) -> Module:
    """A randomly initialised StableDiffusion3Pipeline; `sd35` adds what SD3.5 added: RMS-normed queries and keys, and
    dual attention in the first half of the blocks. The third encoder is absent, as SD3 allows."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = clip_tokenizer(corpus), clip_tokenizer(corpus)
    encoders = [_text_encoder(tokenizer, size) for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=LATENT,
        patch_size=size.patch,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=size.layers,
        attention_head_dim=32,
        num_attention_heads=size.width // 32,
        joint_attention_dim=2 * size.text_width,
        caption_projection_dim=size.width,
        pooled_projection_dim=2 * size.text_width,
        pos_embed_max_size=LATENT // size.patch,
        qk_norm="rms_norm" if sd35 else None,
        dual_attention_layers=tuple(range(size.layers // 2)) if sd35 else (),
    ).eval()
    make: Module = StableDiffusion3Pipeline  # annotated as if no part could be absent
    return make(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae or autoencoder(size),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer_2,
        text_encoder_3=None,
        tokenizer_3=None,
        image_encoder=None,
        feature_extractor=None,
    )


QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def qwen_tokenizer(corpus: Sequence[str], template: str) -> Module:
    """A Qwen2Tokenizer whose merges were learned on the prompt template and a closed vocabulary: one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    stock = Qwen2Tokenizer()  # lends its normaliser and pre-tokeniser
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = stock.backend_tokenizer.normalizer
    bpe.pre_tokenizer = stock.backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    for mark in QWEN_SPECIAL:
        template = template.replace(mark, "")
    words = [w for word in corpus for w in (word, f" {word}", word.capitalize(), f" {word.capitalize()}")]
    bpe.train_from_iterator([*(template.format(w) for w in words)], trainer)
    learned = json.loads(bpe.to_str())["model"]
    make: Module = Qwen2Tokenizer
    merges = [tuple(m) for m in learned["merges"]]
    return make(vocab=learned["vocab"], merges=merges, extra_special_tokens=list(QWEN_SPECIAL[1:]), padding_side="right")


def qwen_autoencoder(size: MiniConfig) -> Module:
    """A tiny AutoencoderKLQwenImage, a video codec that sees images as one frame: 32 x 32 x 3 -> 8 x 8 x 4. Its latents'
    mean and deviation are set after training."""
    from diffusers import AutoencoderKLQwenImage

    n = len(size.vae_channels)
    return AutoencoderKLQwenImage(
        base_dim=size.vae_channels[0],
        z_dim=CHANNELS,
        dim_mult=[c // size.vae_channels[0] for c in size.vae_channels],
        num_res_blocks=1,
        temperal_downsample=[False] * (n - 1),
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    ).eval()


def qwen_image(corpus: Sequence[str], size: MiniConfig, *, seed: int = 0, vae: Module = None) -> Module:
    """A randomly initialised QwenImagePipeline with a tiny Qwen2.5-VL as its text encoder and a static time shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer(corpus, QWEN_TEMPLATE)
    mark = tokenizer.convert_tokens_to_ids
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "hidden_size": size.text_width,
                "intermediate_size": 4 * size.text_width,
                "num_hidden_layers": size.text_layers,
                "num_attention_heads": size.text_width // 32,
                "num_key_value_heads": size.text_width // 32,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": 2048,
                "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
                "bos_token_id": mark("<|endoftext|>"),
                "eos_token_id": mark("<|im_end|>"),
                "pad_token_id": mark("<|endoftext|>"),
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": size.text_width,
            },
            image_token_id=mark("<|image_pad|>"),
            video_token_id=mark("<|video_pad|>"),
            vision_start_token_id=mark("<|vision_start|>"),
            vision_end_token_id=mark("<|vision_end|>"),
        )
    )
    # Its layers start as the identity: words are read at once, in context by and by. Its word vectors start long, so that
    # the first updates do not turn them faster than anything behind them can follow (docs/log.md).
    language: Any = encoder.model.language_model
    torch.nn.init.normal_(language.embed_tokens.weight)
    for layer in language.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=size.layers,
        attention_head_dim=32,
        num_attention_heads=size.width // 32,
        joint_attention_dim=size.text_width,
        axes_dims_rope=(4, 14, 14),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return QwenImagePipeline(scheduler, vae or qwen_autoencoder(size), encoder.eval(), tokenizer, transformer.eval())


def add_text_layer(pipe: Pipeline) -> Pipeline:
    """One more layer at the bottom of both text encoders, in place; it starts as the identity, so nothing changes yet.

    SD3 reads the second to last hidden states: with one layer those are words and places, with two words in context.
    """
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        layers = encoder.text_model.encoder.layers
        new = copy.deepcopy(layers[0])
        for out in (new.self_attn.out_proj, new.mlp.fc2):
            torch.nn.init.zeros_(out.weight)
            torch.nn.init.zeros_(out.bias)
        layers.insert(0, new)
        encoder.config.num_hidden_layers = len(layers)
    return pipe


def as_sd3(pipe: Pipeline, seed: int = 0) -> Module:
    """A miniature SD3 that begins where a miniature SD3.5 is: its weights without dual attention and without the norms of
    queries and keys, whose scale goes into the projections as far as a constant can stand in for it."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(seed)
    old = pipe.transformer
    make: Module = SD3Transformer2DModel
    new = make(**{**old.config, "qk_norm": None, "dual_attention_layers": ()}).eval()
    kept = {k: v.clone() for k, v in old.state_dict().items() if ".attn2." not in k and ".attn.norm_" not in k}
    for name, wanted in new.state_dict().items():
        kept[name] = kept[name][: len(wanted)]  # dual attention's share of the modulation comes last
    for i, block in enumerate(old.transformer_blocks):
        for norm, projection in (("q", "to_q"), ("k", "to_k"), ("added_q", "add_q_proj"), ("added_k", "add_k_proj")):
            scale = getattr(block.attn, f"norm_{norm}").weight.detach()
            key = f"transformer_blocks.{i}.attn.{projection}"
            heads = kept[f"{key}.weight"].unflatten(0, (-1, len(scale)))  # normalised tokens have unit variance
            typical = heads.square().sum((1, 2), keepdim=True).div(len(scale)).sqrt()
            kept[f"{key}.weight"] = (heads / typical * scale[:, None]).flatten(0, 1)
            kept[f"{key}.bias"] = (kept[f"{key}.bias"].unflatten(0, (-1, len(scale))) / typical[..., 0] * scale).flatten()
    new.load_state_dict(kept)
    pipe.register_modules(transformer=new)
    return pipe


def is_mini_pipeline(backbone: Backbone) -> bool:
    """Whether a pipeline is of the miniature, whose vocabulary is closed."""
    return len(backbone.pipe.tokenizer) < 2000
