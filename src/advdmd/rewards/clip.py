"""Scores that are a cosine between CLIP's image and text embeddings: CLIPScore, PickScore, HPSv2.

CLIPScore (2104.08718): 100 max(cos, 0). PickScore (2305.01569): the trained logit scale times cos. HPSv2 (2306.09341): 100 cos,
images padded to a square instead of cropped.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from advdmd.files import write_folder
from advdmd.models.backbone import Module, Tokenizer
from advdmd.models.pretrained import check_empty, load_pretrained_strict, load_tensors_only, load_tokenizer, weights_hash

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEXT_LENGTH = 77


def cropped(image: np.ndarray, size: int) -> Tensor:
    """CLIP's own preprocessing of an image [H, W, 3] uint8.

    The shorter side to `size`, bicubic, the middle cut out. -> [3, size, size]
    """
    picture, (h, w) = Image.fromarray(image), image.shape[:2]
    scale = size / min(h, w)
    picture = picture.resize((max(size, int(w * scale)), max(size, int(h * scale))), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return _normalised(picture.crop((left, top, left + size, top + size)))


def padded(image: np.ndarray, size: int) -> Tensor:
    """HPSv2's preprocessing of an image [H, W, 3] uint8.

    The longer side to `size`, bicubic, black around it. -> [3, size, size]
    """
    picture, (h, w) = Image.fromarray(image), image.shape[:2]
    scale = size / max(h, w)
    picture = picture.resize((max(1, round(w * scale)), max(1, round(h * scale))), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (size, size))
    canvas.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return _normalised(canvas)


def _normalised(picture: Image.Image) -> Tensor:
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class ClipScorer:
    """A cosine of one CLIP's embeddings, times `scale`, not below `least`.

    prepare: an image [H, W, 3] and a side -> pixels [3, side, side].
    """

    def __init__(
        self,
        name: str,
        model: Module,
        tokenizer: Tokenizer,
        scale: float,
        least: float = float("-inf"),
        prepare: Callable[[np.ndarray, int], Tensor] = cropped,
        fingerprint: str = "",
        device: str = "cpu",
    ):
        self.name, self.fingerprint, self.scale, self.least, self.prepare = name, fingerprint, scale, least, prepare
        self.model, self.tokenizer, self.device = model.to(device).eval(), tokenizer, device

    @torch.no_grad()
    def embed(self, images: Sequence[np.ndarray]) -> Tensor:
        """Embeddings [N, D] of unit length of N images [H, W, 3] uint8."""
        size = self.model.config.vision_config.image_size
        pixels = torch.stack([self.prepare(i, size) for i in images]).to(self.device)
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.float().cpu(), dim=-1)

    @torch.no_grad()
    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        """Scores [N] of N images [H, W, 3] uint8 for N prompts."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        ).to(self.device)
        text = F.normalize(self.model.get_text_features(**tokens).pooler_output.float().cpu(), dim=-1)
        return (self.scale * (self.embed(images) * text).sum(-1)).clamp(min=self.least)


def _loaded(folder: Path) -> tuple[Module, Module]:
    from transformers import CLIPModel

    return load_pretrained_strict(CLIPModel, folder), load_tokenizer(folder)


def clip_score(folder: Path, device: str = "cpu") -> ClipScorer:
    """CLIPScore with the CLIP of a folder in transformers' format. Raises ValueError if its weights do not fit."""
    model, tokenizer = _loaded(folder)
    name = f"clipscore[{folder.resolve().name}]"
    return ClipScorer(name, model, tokenizer, 100.0, 0.0, fingerprint=weights_hash(folder), device=device)


def pick_score(folder: Path, device: str = "cpu") -> ClipScorer:
    """Weights of yuvalkirstain/PickScore_v1, tokenizer of its base CLIP beside them."""
    model, tokenizer = _loaded(folder)
    scale = model.logit_scale.exp().item()
    return ClipScorer("pickscore", model, tokenizer, scale, fingerprint=weights_hash(folder), device=device)


def hps_v2(folder: Path, device: str = "cpu") -> ClipScorer:
    """A folder that `convert_hps` made; a tokenizer of CLIP ViT-H beside it."""
    model, tokenizer = _loaded(folder)
    return ClipScorer("hpsv2", model, tokenizer, 100.0, prepare=padded, fingerprint=weights_hash(folder), device=device)


OPEN_CLIP = (  # open_clip's names -> CLIPModel's; \1 is the layer
    (r"visual\.transformer\.resblocks\.(\d+)\.", r"vision_model.encoder.layers.\1."),
    (r"transformer\.resblocks\.(\d+)\.", r"text_model.encoder.layers.\1."),
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"visual\.proj$", "visual_projection.weight"),
    (r"text_projection$", "text_projection.weight"),
    (r"token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"ln_final\.", "text_model.final_layer_norm."),
    (r"logit_scale$", "logit_scale"),
)
WITHIN = (
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
    ("attn.", "self_attn."),
)


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's state dict as CLIPModel's: names, split projections [3 D, ...] -> [D, ...], transposed heads.

    Raises ValueError on unknown names.
    """
    out: dict[str, Tensor] = {}
    for name, v in state.items():
        if name == "attn_mask":
            continue
        for pattern, target in OPEN_CLIP:
            if re.match(pattern, name):
                new = re.sub(f"^{pattern}", target, name)
                break
        else:
            raise ValueError(f"{name!r} is no parameter of open_clip's CLIP")
        if ".layers." in new:
            for old, ours in WITHIN:
                new = new.replace(old, ours)
        if "in_proj_" in new:
            out |= {new.replace("in_proj_", f"{n}_proj."): part for n, part in zip("qkv", v.chunk(3), strict=True)}
        else:
            out[new] = v.T.contiguous() if name in ("visual.proj", "text_projection") else v
    return out


def convert_hps(checkpoint: Path, base: Path, out: Path) -> Path:
    """HPS_v2.1_compressed.pt -> a CLIPModel folder; only tensors are read from the pickle.

    `base`: folder of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which lends its config and tokenizer. Raises ValueError if `out` is
    not empty, the file is no such checkpoint, or it does not fit the config.
    """
    from transformers import CLIPConfig, CLIPModel

    check_empty(out)
    state = from_open_clip(load_tensors_only(checkpoint))
    try:
        config, tokenizer = CLIPConfig.from_pretrained(base, local_files_only=True), load_tokenizer(base)
    except (OSError, ValueError) as e:
        raise ValueError(f"{base} is no CLIP's folder: {e}") from None
    model = CLIPModel(config)
    missing, extra = model.load_state_dict(state, strict=False)
    if missing or extra:
        raise ValueError(f"{checkpoint} does not fit {base}: {missing[:2]} missing, {extra[:2]} left over")

    def write(making: Path) -> None:
        model.save_pretrained(making)
        tokenizer.save_pretrained(making)

    write_folder(out, write)
    return out
