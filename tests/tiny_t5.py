"""A real StableDiffusion3Pipeline with all three text encoders, as small as it gets."""

import json

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
