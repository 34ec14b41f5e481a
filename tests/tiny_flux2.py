"""A Flux2KleinPipeline of the real classes with random weights."""

import torch

from advdmd.mini import pipelines
from tests.tiny_z_image import CHAT


def flux2(corpus, size, distilled=False, seed=0):
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    tokenizer = pipelines.qwen_tokenizer(corpus, "user\n{}\nassistant\n")
    tokenizer.chat_template = CHAT
    text = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=28,  # the pipeline reads layer 27
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
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
        guidance_embeds=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0)
    return Flux2KleinPipeline(scheduler, vae.eval(), text.eval(), tokenizer, net.eval(), is_distilled=distilled)
