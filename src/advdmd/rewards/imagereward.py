"""ImageReward (2304.05977): BLIP's text encoder looks at the image, a small network rates its first token.

transformers' BLIP parts carry the original weights; its package needs torchvision and an older transformers.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from advdmd.files import file_hash
from advdmd.models.backbone import Module, Tokenizer
from advdmd.models.pretrained import load_tensors_only, load_tokenizer
from advdmd.rewards.clip import cropped

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw rating over the authors' validation set
LENGTH = 35  # tokens of a prompt
VISION = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.proj.", ".self_attn.projection."),
    (".attn.qkv.", ".self_attn.qkv."),
)


class Network(nn.Module):
    """Image and text encoder and the rating head; `width` of the text encoder."""

    def __init__(self, vision: Module, text: Module):
        from transformers import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        widths = (text.hidden_size, 1024, 128, 64, 16, 1)
        layers: list[nn.Module] = []
        for i in range(5):  # dropout between the first four, no activations: as published
            layers += [nn.Linear(widths[i], widths[i + 1]), *([nn.Dropout(0.1)] if i < 3 else [])]
        self.rating = nn.Sequential(*layers)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """pixels [N, 3, 224, 224], ids [N, L], mask [N, L] -> ratings [N]."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        all_seen = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, encoder_attention_mask=all_seen)
        return (self.rating(read.last_hidden_state[:, 0])[:, 0] - MEAN) / STD


def published() -> tuple[Module, Module]:
    """The configs of ImageReward-v1.0: ViT-L/16 at 224, BERT-base with cross-attention."""
    from transformers import BlipTextConfig, BlipVisionConfig

    vision = BlipVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224, patch_size=16
    )
    vision.layer_norm_eps = 1e-6
    text = BlipTextConfig(
        vocab_size=30524,
        hidden_size=768,
        encoder_hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
    )
    return vision, text


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ImageReward.pt's state dict as `Network`'s, tensors of the same shapes [...], without the contrastive projections, which
    rating does not use.

    Raises ValueError on unknown names.
    """
    out: dict[str, Tensor] = {}
    for name, v in state.items():
        if name.startswith(("blip.vision_proj.", "blip.text_proj.")) or name.endswith("position_ids"):
            continue
        if name.startswith("blip.visual_encoder."):
            new = name.removeprefix("blip.visual_encoder.")
            new = re.sub(r"^norm\.", "post_layernorm.", new)
            for theirs, ours in VISION:
                new = new.replace(theirs, ours)
            out[f"vision.{new}"] = v
        elif name.startswith("blip.text_encoder."):
            out[f"text.{name.removeprefix('blip.text_encoder.')}"] = v
        elif name.startswith("mlp.layers."):
            out[f"rating.{name.removeprefix('mlp.layers.')}"] = v
        else:
            raise ValueError(f"{name!r} is no parameter of ImageReward")
    return out


class ImageReward:
    """ImageReward's rating of an image for a prompt."""

    name = "imagereward"

    def __init__(self, net: Network, tokenizer: Tokenizer, fingerprint: str, device: str = "cpu"):
        self.net, self.tokenizer, self.fingerprint, self.device = net.to(device).eval(), tokenizer, fingerprint, device

    @torch.no_grad()
    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        """Ratings [N] of N images [H, W, 3] uint8 for N prompts."""
        size = int(self.net.vision.config.image_size)  # type: ignore[arg-type]
        pixels = torch.stack([cropped(i, size) for i in images]).to(self.device)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
        ).to(self.device)
        return self.net(pixels, tokens.input_ids, tokens.attention_mask).float().cpu()


def image_reward(folder: Path, device: str = "cpu", settings: tuple[Module, Module] | None = None) -> ImageReward:
    """The scorer of a folder with ImageReward.pt (only its tensors are read) and the tokenizer of bert-base-uncased.

    Raises ValueError if it does not fit.
    """
    file = folder / "ImageReward.pt"
    net = Network(*(settings or published()))
    missing, extra = net.load_state_dict(converted(load_tensors_only(file)), strict=False)
    if missing or extra:
        raise ValueError(f"{file} does not fit: {missing[:2]} missing, {extra[:2]} left over")
    return ImageReward(net, load_tokenizer(folder), file_hash(file)[:16], device)
