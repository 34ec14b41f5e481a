"""Pipelines of the real classes with random weights: SD3 with T5, Qwen-Image-Edit, FLUX.1, FLUX.2, Z-Image."""

import json

import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from advdmd.mini import pipelines
from advdmd.mini.world.caption import VOCABULARY
from tests.conftest import TINY


def t5_tokenizer():
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{w}", -2.0) for w in VOCABULARY)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def sd3_with_t5():
    import torch
    from diffusers import StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel

    tokenizer = t5_tokenizer()
    small = pipelines.sd3(VOCABULARY, TINY, sd35=True)
    torch.manual_seed(5)
    width = small.transformer.config.joint_attention_dim
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return StableDiffusion3Pipeline(
        **small.components | {"text_encoder_3": T5EncoderModel(config).eval(), "tokenizer_3": tokenizer}
    )


def save_teacher(folder):
    """The pipeline as a teacher's folder, with this package's metadata."""
    sd3_with_t5().save_pretrained(folder)
    (folder / "advdmd.json").write_text(json.dumps({"sampling": {"steps": 2, "guidance": 2.0}, "t5_length": 6}))
    return folder


def flux(corpus, size, guidance_embeds=True, seed=0):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(seed)
    tokenizer = pipelines.clip_tokenizer(corpus)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.text_width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    words = t5_tokenizer()
    t5 = T5EncoderModel(T5Config(vocab_size=len(words), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    net = FluxTransformer2DModel(
        in_channels=4 * pipelines.CHANNELS,
        num_layers=size.layers,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=size.text_width,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0)
    vae = pipelines.autoencoder(size)
    return FluxPipeline(scheduler, vae, clip.eval(), tokenizer, t5.eval(), words, net.eval())


def flux2(corpus, size, distilled=False, dev=False, seed=0):
    """FLUX.2 klein, or dev with the tokenizer that stands for its processor."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Pipeline,
        Flux2Transformer2DModel,
    )

    torch.manual_seed(seed)
    tokenizer, text = _mistral(corpus) if dev else _qwen3(corpus)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=pipelines.CHANNELS,
        norm_num_groups=4,
        sample_size=32,
    )
    for stat, low in ((vae.bn.running_mean, -0.3), (vae.bn.running_var, 0.5)):  # as of a trained one: no two channels alike
        stat.copy_(low + torch.rand_like(stat))
    net = Flux2Transformer2DModel(
        in_channels=4 * pipelines.CHANNELS,
        num_layers=size.layers,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=dev,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0)
    parts = (scheduler, vae.eval(), text.eval(), tokenizer, net.eval())
    return Flux2Pipeline(*parts) if dev else Flux2KleinPipeline(*parts, is_distilled=distilled)


NARROW = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 8},
}


def _qwen3(corpus):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = pipelines.qwen_tokenizer(corpus, "user\n{}\nassistant\n")
    tokenizer.chat_template = CHAT
    layers = 28  # the pipeline reads layer 27
    config = {"vocab_size": len(tokenizer), "num_hidden_layers": layers, "pad_token_id": tokenizer.pad_token_id}
    return tokenizer, Qwen3ForCausalLM(Qwen3Config(**config, **NARROW))


def _mistral(corpus):
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    tokenizer = pipelines.qwen_tokenizer([*corpus, *SYSTEM_MESSAGE.split()], "system\nuser\n{}\n")
    tokenizer.chat_template, tokenizer.padding_side = PARTS_CHAT, "left"
    layers = 31  # the pipeline reads layer 30
    config = {"vocab_size": len(tokenizer), "num_hidden_layers": layers, "pad_token_id": tokenizer.pad_token_id}
    vision = {**NARROW, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    return tokenizer, Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=MistralConfig(**config, **NARROW), vision_config=PixtralVisionConfig(**vision))
    )


PARTS_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{{ c.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def z_image(corpus, size, seed=0):
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(seed)
    tokenizer = pipelines.qwen_tokenizer(corpus, "user\n{}\nassistant\n")
    tokenizer.chat_template = CHAT
    text = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=size.text_width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    net = ZImageTransformer2DModel(
        in_channels=pipelines.CHANNELS,
        dim=size.width,
        n_layers=size.layers,
        n_refiner_layers=1,
        n_heads=size.width // 32,
        n_kv_heads=size.width // 32,
        cap_feat_dim=size.text_width,
        axes_dims=[8, 12, 12],
        axes_lens=[256, 64, 64],
    )
    for p in (net.x_pad_token, net.cap_pad_token):  # otherwise undefined or zero: padding must matter where it is read
        torch.nn.init.normal_(p, std=0.5)
    for p in net.parameters():  # gates and the last layer start at zero, which hides mistakes
        if p.ndim > 1 and not p.any():
            torch.nn.init.normal_(p, std=0.1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return ZImagePipeline(scheduler, pipelines.autoencoder(size), text.eval(), tokenizer, net.eval())


EDIT_HEAD = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how the "
    "user's text instruction should alter or modify the image. Generate a new image that meets the user's requirements while "
    "maintaining consistency with the original input where appropriate."
)


def qwen_image_edit(corpus, size, plus=True, zero_cond_t=False, seed=0):
    from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImageTransformer2DModel
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from advdmd.models.qwen_image_edit import VisionProcessor

    parts = dict(pipelines.qwen_image([*corpus, EDIT_HEAD], size, seed=seed).components)
    images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56)
    parts["processor"] = VisionProcessor(parts["tokenizer"], images)
    net = QwenImageTransformer2DModel(**{**parts["transformer"].config, "zero_cond_t": zero_cond_t}).eval()
    net.load_state_dict(parts["transformer"].state_dict())
    return (QwenImageEditPlusPipeline if plus else QwenImageEditPipeline)(**parts | {"transformer": net})


FAMILIES = {
    "sd3": lambda: pipelines.sd3(VOCABULARY, TINY, sd35=False),
    "sd35": lambda: pipelines.sd3(VOCABULARY, TINY, sd35=True),
    "qwen": lambda: pipelines.qwen_image(VOCABULARY, TINY),
    "z-image": lambda: z_image(VOCABULARY, TINY),
    "flux": lambda: flux(VOCABULARY, TINY),
    "flux2": lambda: flux2(VOCABULARY, TINY),
    "flux2-dev": lambda: flux2(VOCABULARY, TINY, dev=True),
}
