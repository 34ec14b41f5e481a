"""A FluxPipeline of the real classes with random weights."""

import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from advdmd.mini import pipelines


def flux(corpus, size, guidance_embeds=True, seed=0):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from tests.tiny_t5 import t5_tokenizer

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
