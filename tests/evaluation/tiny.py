"""Judges of the real classes, as small as they get, with random weights."""

import json
from functools import cache

import numpy as np
import torch

from advdmd.evaluation.geneval import COCO, COLORS
from advdmd.evaluation.judges import mask2former
from advdmd.mini.pipelines import QWEN_TEMPLATE, clip_tokenizer, qwen_tokenizer

WORDS = sorted({w for c in COCO for w in c.split()} | set(COLORS) | {"a", "photo", "of", "object", "colored", "-"})


def detector_config(**changes):
    from transformers import SwinConfig

    swin = SwinConfig(
        embed_dim=12,
        depths=[1, 1, 2, 1],
        num_heads=[1, 1, 2, 2],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    small = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "encoder_layers": 1, "decoder_layers": 2}
    small |= {"num_attention_heads": 2, "dim_feedforward": 16, "encoder_feedforward_dim": 16, "num_queries": 12}
    return mask2former.config(backbone_config=swin, **small | changes)


def detector(seed=0, confident=True):
    """A random Mask2Former; `confident` ones have class logits large enough to detect things."""
    from transformers import Mask2FormerForUniversalSegmentation

    torch.manual_seed(seed)
    net = Mask2FormerForUniversalSegmentation(detector_config()).eval()
    if confident:
        with torch.no_grad():
            net.class_predictor.weight.mul_(60)
    return net


@cache
def tokenizer_of_clip():
    """Trained once: two trainings number their tokens differently."""
    tokenizer = clip_tokenizer(WORDS)
    tokenizer.model_max_length = 77
    return tokenizer


def clip(seed=0, hidden_act="quick_gelu"):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(seed)
    tokenizer = tokenizer_of_clip()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=hidden_act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=8,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        patch_size=56,
        image_size=224,
        hidden_act=hidden_act,
        projection_dim=8,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).eval(), tokenizer


def image_processor():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil()


def name_red_and_blue(model, tokenizer, names=("red", "blue")):
    """Change the image projection so that the red and the blue square of the self-test get these names."""
    from advdmd.evaluation.judges import geneval_detector

    colours = geneval_detector.ClipColorClassifier(model, tokenizer, image_processor())
    mask = np.zeros((128, 128), bool)
    mask[32:96, 32:96] = True
    crops = []
    for rgb in ((224, 31, 31), (31, 64, 230)):
        image = np.full((128, 128, 3), 200, np.uint8)
        image[mask] = rgb
        crops.append(geneval_detector.crop(image, mask, (32, 32, 96, 96)))
    with torch.no_grad():
        pixels = image_processor()(crops, return_tensors="pt").pixel_values
        features = model.vision_model(pixel_values=pixels).pooler_output
        targets = colours._classifier("book")[[COLORS.index(name) for name in names]]
        model.visual_projection.weight.copy_((torch.linalg.pinv(features) @ targets).T)


def save_clip(folder, seed=0, hidden_act="quick_gelu", names=None):
    """A random CLIP; with `names`, what it calls red and blue (random ones may be right by chance)."""
    model, tokenizer = clip(seed, hidden_act)
    if names:
        name_red_and_blue(model, tokenizer, names)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def save_qwen_vl(folder, seed=0):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer(["yes", "no", "is", "there", "answer", "with", "only", "or", "picture", "red"], QWEN_TEMPLATE)
    tokenizer.chat_template = CHAT
    mark = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 1e4},
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=mark("<|image_pad|>"),
        video_token_id=mark("<|video_pad|>"),
        vision_start_token_id=mark("<|vision_start|>"),
        vision_end_token_id=mark("<|vision_end|>"),
    )
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # so that answers differ
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, min_pixels=1024, max_pixels=16384).save_pretrained(folder)
    return folder


DPG_ROWS = [  # item, text, id, parents, tuple, question
    ("one", "A red cube on a table.", 1, "0", "entity - whole (cube)", "Is there a cube?"),
    ("one", "A red cube on a table.", 2, "1", "attribute - color (cube, red)", "Is the cube red?"),
    ("one", "A red cube on a table.", 3, "0", "entity - whole (table)", "Is there a table?"),
    ("one", "A red cube on a table.", 4, "1,3", "relation - spatial (cube, table, on)", "Is the cube on the table?"),
    ("two", "Two dogs, one barking.", 1, "0", "entity - whole (dogs)", "Are there dogs?"),
    ("two", "Two dogs, one barking.", 2, "1", "other - count (dogs==2)", "Are there two dogs?"),
    ("two", "Two dogs, one barking.", 3, "2", "entity - state (dog, bark)", "Is one of the two dogs barking?"),
]


def save_dpg(path, rows=DPG_ROWS):
    import csv

    head = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple"]
    with open(path, "w", newline="") as f:
        out = csv.writer(f)
        out.writerow([*head, "question_natural_language"])
        for item, text, number, parents, tuple_, question in rows:
            out.writerow([item, text, "", number, parents, "", "", tuple_, question])
    return path


def loads(text):
    return [json.loads(line) for line in text.splitlines()]
