"""A ZImagePipeline of the real classes with random weights."""

import torch

from advdmd.mini import pipelines

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
