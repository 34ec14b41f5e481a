"""GenEval's eyes: Mask2Former finds objects, CLIP names their colours; pre- and post-processing as its own code has them.

Neither torchvision nor OpenMMLab's packages are needed.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from advdmd.evaluation.benchmark import Judgement, SuiteItem
from advdmd.evaluation.geneval import COCO, COLORS, THRESHOLD
from advdmd.evaluation.judges.mask2former import is_geneval_detector
from advdmd.models.backbone import Module, Tokenizer
from advdmd.models.pretrained import load_pretrained_strict, load_tokenizer, weights_hash
from advdmd.types import Json

LONG, SHORT, MULTIPLE = 1333, 800, 32  # the detector's input: sides to fit into, and what both are padded to a multiple of
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB
NAME = "mask2former-swin-s + clip"
TOP = 100  # of all (query, class) pairs
MAX_OBJECTS = 16  # of one class
TEMPLATES = ("a photo of a {c} {k}", "a photo of a {c}-colored {k}", "a photo of a {c} object")
BLANK = "#999"  # what surrounds an object whose colour is asked for


class Instances(NamedTuple):
    """Objects of one image, most confident first: labels [n], confidence [n], boxes [n, 4] in pixels, masks [n, H, W]."""

    labels: Tensor
    confidence: Tensor
    boxes: Tensor
    masks: Tensor


def preprocess(image: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
    """[H, W, 3] uint8 RGB -> input [1, 3, h', w'], zero-padded, and its size (h, w) before padding."""
    height, width = image.shape[:2]
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    h, w = int(height * scale + 0.5), int(width * scale + 0.5)
    x = torch.tensor(image).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, (h, w), mode="bilinear", align_corners=False).round()  # without antialiasing, as OpenCV resizes bytes
    x = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    return F.pad(x, (0, -w % MULTIPLE, 0, -h % MULTIPLE)), (h, w)


def boxes_from_masks(masks: Tensor) -> Tensor:
    """[n, 4] left, top, right, bottom of masks [n, H, W]; the last pixel is inside, an empty mask has an empty box."""
    out = torch.zeros(len(masks), 4)
    for box, mask in zip(out, masks, strict=True):
        ys, xs = mask.any(1).nonzero(), mask.any(0).nonzero()
        if len(xs):
            box[:] = torch.stack([xs[0, 0], ys[0, 0], xs[-1, 0] + 1, ys[-1, 0] + 1])
    return out


def instances_from_logits(
    classes: Tensor, masks: Tensor, padded: tuple[int, int], size: tuple[int, int], image: tuple[int, int]
) -> Instances:
    """Instances from one image's class logits [Q, C + 1] and mask logits [Q, h, w], at the size of the image.

    An object's confidence is its class probability x the mean probability inside its mask, hence never above the first: what
    that already rules out is dropped before masks are enlarged.
    """
    scores = classes.softmax(-1)[:, :-1]
    top, which = scores.flatten().topk(min(TOP, scores.numel()))
    top, which = top[top > THRESHOLD], which[top > THRESHOLD]
    labels, queries = which % scores.shape[1], which // scores.shape[1]
    if not len(labels):
        return Instances(labels, top, torch.zeros(0, 4), torch.zeros(0, *image, dtype=torch.bool))
    m = F.interpolate(masks[queries][None], padded, mode="bilinear", align_corners=False)[..., : size[0], : size[1]]
    m = F.interpolate(m, image, mode="bilinear", align_corners=False)[0]
    inside = m > 0
    confidence = top * (m.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    order = confidence.argsort(descending=True)
    order = order[confidence[order] > THRESHOLD]
    inside = inside[order]
    return Instances(labels[order], confidence[order], boxes_from_masks(inside), inside)


def crop(image: np.ndarray, mask: np.ndarray, box: Sequence[float]) -> Image.Image:
    """An object alone, as a picture.

    Image [H, W, 3] uint8, grey outside its mask [H, W], cut to its box (left, top, right, bottom).
    """
    picture = Image.fromarray(image)
    alone = Image.composite(picture, Image.new("RGB", picture.size, BLANK), Image.fromarray(mask))
    return alone.crop(tuple(round(v) for v in box))  # type: ignore[arg-type]


class ClipColorClassifier:
    """CLIP's zero-shot answer to which of ten colours an object has.

    Raises ValueError if the CLIP has another activation than OpenAI's ViT-L/14.
    """

    def __init__(self, clip: Module, tokenizer: Tokenizer, processor: Tokenizer, device: str = "cpu"):
        acts = {clip.config.text_config.hidden_act, clip.config.vision_config.hidden_act}
        if acts != {"quick_gelu"}:
            raise ValueError(
                f"this CLIP has {sorted(acts)} where OpenAI's ViT-L/14 has quick_gelu: its colours would be others"
            )
        self.clip, self.tokenizer, self.processor, self.device = clip.to(device).eval(), tokenizer, processor, device
        self.names: dict[str, Tensor] = {}

    @torch.no_grad()
    def _classifier(self, label: str) -> Tensor:
        """[10, D]: a colour is the normalised mean of its templates' normalised embeddings."""
        if label not in self.names:
            texts = [t.format(c=c, k=label) for c in COLORS for t in TEMPLATES]
            tokens = self.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
            text = self.clip.get_text_features(**tokens.to(self.device)).pooler_output
            mean = F.normalize(text, dim=-1).unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1)
            self.names[label] = F.normalize(mean, dim=-1)
        return self.names[label]

    @torch.no_grad()
    def name(self, crops: Sequence[Image.Image], label: str) -> list[str]:
        """The colour of each of some crops of objects of class `label`."""
        pixels = self.processor(list(crops), return_tensors="pt").pixel_values.to(self.device)
        seen = F.normalize(self.clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        return [COLORS[int(i)] for i in (seen @ self._classifier(label).T).argmax(1)]


class GenEvalDetector:
    """GenEval's judge; only with OpenMMLab's weights (`comparable`) can its figures be compared to published ones."""

    batch = 1  # images may differ in size

    def __init__(self, net: Module, colours: ClipColorClassifier, fingerprint: str, comparable: bool, device: str = "cpu"):
        self.net, self.colours, self.device = net.to(device).eval(), colours, device
        self.name = NAME + ("" if comparable else " (other weights than GenEval's: not comparable)")
        self.fingerprint = fingerprint

    def self_test(self) -> None:
        """A red and a blue square must be named so: channels in order, activation and templates right.

        Raises ValueError if not.
        """
        for color, rgb in (("red", (224, 31, 31)), ("blue", (31, 64, 230))):
            image = np.full((128, 128, 3), 200, np.uint8)
            image[32:96, 32:96] = rgb
            mask = np.zeros((128, 128), bool)
            mask[32:96, 32:96] = True
            (found,) = self.colours.name([crop(image, mask, (32, 32, 96, 96))], "book")
            if found != color:
                raise ValueError(f"self-test: a drawn {color} square is called {found}: these CLIP weights cannot name colours")

    @torch.no_grad()
    def judge(self, items: Sequence[SuiteItem], images: Sequence[np.ndarray]) -> list[Judgement]:
        """Objects in each of N images [H, W, 3] above the threshold, at most 16 of a class.

        Colours of those classes whose colour the item asks for.
        """
        return [self._look(item, image) for item, image in zip(items, images, strict=True)]

    def _look(self, item: SuiteItem, image: np.ndarray) -> Judgement:
        x, size = preprocess(image)
        out = self.net(pixel_values=x.to(self.device))
        classes, masks = out.class_queries_logits[0].float().cpu(), out.masks_queries_logits[0].float().cpu()
        found = instances_from_logits(classes, masks, (x.shape[-2], x.shape[-1]), size, (image.shape[0], image.shape[1]))
        objects: list[Json] = []
        asked = {c["class"] for c in item.meta["include"] if "color" in c}
        for k in found.labels.unique().tolist():
            mine = (found.labels == k).nonzero()[:MAX_OBJECTS, 0].tolist()
            colors: list[str | None] = [None] * len(mine)
            if COCO[k] in asked:
                crops = [crop(image, found.masks[i].numpy(), found.boxes[i].tolist()) for i in mine]
                colors = list(self.colours.name(crops, COCO[k]))
            for i, c in zip(mine, colors, strict=True):
                seen = {"label": COCO[k], "confidence": round(found.confidence[i].item(), 5), "box": found.boxes[i].tolist()}
                objects.append(seen | ({"color": c} if c else {}))
        return {"objects": objects}


def load_color_classifier(folder: Path, device: str = "cpu") -> ClipColorClassifier:
    """The colour classifier of a CLIP folder in transformers' format. Raises ValueError if its weights do not fit."""
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    tokenizer = load_tokenizer(folder)
    return ClipColorClassifier(load_pretrained_strict(CLIPModel, folder), tokenizer, processor, device)


def load_detector(detector: Path, clip: Path, device: str = "cpu") -> GenEvalDetector:
    """From two folders in transformers' format. Raises ValueError on missing, left-over or differently shaped weights."""
    from transformers import Mask2FormerForUniversalSegmentation

    net = load_pretrained_strict(Mask2FormerForUniversalSegmentation, detector)
    if net.config.num_labels != len(COCO):
        raise ValueError(f"{detector} knows {net.config.num_labels} classes, GenEval's detector {len(COCO)}")
    marks = "".join(weights_hash(p) for p in (detector, clip))
    fingerprint = hashlib.sha256(f"{marks}/{TOP}/{THRESHOLD}/{MAX_OBJECTS}".encode()).hexdigest()[:16]
    return GenEvalDetector(net, load_color_classifier(clip, device), fingerprint, is_geneval_detector(detector), device)
