"""Qwen-Image-Edit through diffusers' own classes: a prompt says how source images are to be changed."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from advdmd.models.backbone import Module, Pipeline, Tokenizer
from advdmd.models.qwen_image import CARD_NULL_PROMPT, QwenImage
from advdmd.types import Cond, Edit, Json, Prompt

SOURCE_SIDE = 1024  # pixels: of the square whose area a source image has for autoencoder and transformer
VISION_SIDE = 384  # the same for the text encoder, since version 2509
PLACE = "<|image_pad|>"  # of an image in a prompt
UNIT = 32  # pixels: sides of source images are multiples


def size_of_area(side: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of about the area of a square, in the ratio height to width, in multiples of UNIT."""
    ratio = width / height
    wide = math.sqrt(side * side * ratio)
    return round(wide / ratio / UNIT) * UNIT, round(wide / UNIT) * UNIT


def check_source_images(pipeline: str, prompts: Sequence[Prompt]) -> None:
    """Raises ValueError if a prompt has several source images and a class of pipelines takes one."""
    several = [p for p in prompts if isinstance(p, Edit) and len(p.sources) > 1]
    if pipeline == "QwenImageEditPipeline" and several:
        raise ValueError(
            f"{str(several[0])[:80]!r} has {len(several[0].sources)} source images: a {pipeline} takes one; give one, or use "
            "Qwen-Image-Edit 2509 or 2511"
        )


class VisionProcessor:
    """Prompts and images as a Qwen2.5-VL takes them: the image's place in the prompt as many times as the image has tokens.

    transformers' own processor needs a video processor and with it torchvision, so these few steps are made here.
    """

    def __init__(self, tokenizer: Tokenizer, images: Tokenizer):
        self.tokenizer, self.images = tokenizer, images

    @classmethod
    def from_pretrained(cls, folder: Path) -> "VisionProcessor":
        """The processor in a pipeline's folder. Raises ValueError if that is not possible."""
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return cls(tokenizer, Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True))
        except (OSError, ValueError) as e:
            raise ValueError(f"{folder} holds no processor that can be loaded: {e}") from None

    def __call__(
        self, text: Sequence[str], images: Image.Image | Sequence[Image.Image], padding: bool, return_tensors: str
    ) -> Module:
        """Token ids and masks [N, L] of N prompts, and pixels and grids of their images in order."""
        seen = self.images(images=images, return_tensors=return_tensors)
        slots = iter((seen["image_grid_thw"].prod(-1) // self.images.merge_size**2).tolist())
        whole = [head + "".join(PLACE * next(slots) + rest for rest in more) for head, *more in (t.split(PLACE) for t in text)]
        found = self.tokenizer(whole, padding=padding, padding_side="right", return_tensors=return_tensors)
        found.update(seen)
        return found


class QwenImageEdit(QwenImage):
    """A QwenImageEditPipeline with one source image, or a QwenImageEditPlusPipeline (since version 2509), as a backbone.

    The text encoder sees the source images beside the prompt, the transformer has their latents as further tokens. Both
    pipelines scale source images to `source_side` squared in pixels, whatever the size of the image that is sampled. The first
    shows that to the text encoder too, the second VISION_SIDE squared. side: of the latents, null_prompt: as in `QwenImage`.
    """

    edits = True

    def __init__(self, pipe: Pipeline, side: int = 128, null_prompt: str = CARD_NULL_PROMPT, source_side: int = SOURCE_SIDE):
        super().__init__(pipe, side, null_prompt)
        self.source_side, self.max_text_length = source_side, sys.maxsize  # these pipelines cut no prompt
        self.metadata |= {"edits": True, "source_side": source_side}

    def pipeline_call_kwargs(self, steps: int) -> Json:
        """`steps` steps and no guidance; where training was at 1024 pixels, the image has the source's ratio."""
        found = super().pipeline_call_kwargs(steps)
        follows = found["height"] == SOURCE_SIDE
        return {k: v for k, v in found.items() if k not in ("max_sequence_length", *("height", "width") * follows)}

    def encode_edits(self, edits: Sequence[Edit], height: int, width: int) -> Cond:
        """Prompts with as many source images each -> conditions [N] for images of this size in pixels.

        They have `source` and `null`.

        Source images are cropped to the ratio of the size. Raises ValueError that names an image which cannot be read, and on
        several for the first version.
        """
        return Cond.cat([self._encode_edit(e, *size_of_area(self.source_side, height, width)) for e in edits])

    def _encode_edit(self, edit: Edit, height: int, width: int) -> Cond:
        pipe, images = self.pipe, [source.load(height, width) for source in edit.sources]
        shown: object = images[0]
        if type(pipe).__name__ == "QwenImageEditPlusPipeline":
            shown = [source.load(*size_of_area(VISION_SIDE, height, width)) for source in edit.sources]
        else:
            check_source_images(type(pipe).__name__, [edit])
        device = next(pipe.text_encoder.parameters()).device
        cond, null = (self._embed(p, shown, device) for p in (edit.prompt, self.null_prompt))
        pixels = pipe.image_processor.preprocess(images, height, width).to(next(self.vae.parameters()).device)
        return Cond(cond.embeds, mask=cond.mask, source=self.encode(pixels)[None].to(device), null=null)

    def _embed(self, prompt: str, image: object, device: torch.device) -> Cond:
        """The pipeline's own embeddings of a prompt beside an image, or beside a list of them."""
        embeds, _ = self.pipe.encode_prompt(prompt=[prompt], image=image, device=device)
        mask: Tensor = torch.ones(embeds.shape[:2], dtype=torch.long, device=device)
        return Cond(embeds, mask=mask)
