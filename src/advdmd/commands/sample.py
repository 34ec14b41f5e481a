"""The command sample: draw prompts with a teacher or a student."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from advdmd.files import write_image
from advdmd.mini.world.caption import check_prompt
from advdmd.models import loading
from advdmd.models.images import image_sampler
from advdmd.models.sampler import SamplerConfig


def paint(model: str, prompts: Sequence[str], folder: Path, how: SamplerConfig | None = None, seed: int = 0) -> list[Path]:
    """Draw prompts with a model into `folder`; returns the files."""
    backbone, own = loading.load(model)
    if loading.is_mini_pipeline(backbone):
        for p in prompts:
            check_prompt(p)
            limit = backbone.pipe.tokenizer.model_max_length
            if len(backbone.pipe.tokenizer(p).input_ids) > limit:
                raise ValueError(f"prompt {p!r} is longer than the {limit - 2} words this model reads: say less")
    images = image_sampler(backbone, backbone.net, how or own)(prompts, [("sample", k, seed) for k in range(len(prompts))])
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{k:03d}.png" for k in range(len(prompts))]
    for path, image in zip(paths, images, strict=True):
        write_image(path, Image.fromarray(image))
    return paths
