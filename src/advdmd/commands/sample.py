"""The command sample: sample prompts with a teacher or a student."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from advdmd.data.captioned_images import ImagePlace
from advdmd.files import write_image
from advdmd.models import loading
from advdmd.models.backbone import Backbone
from advdmd.models.images import image_sampler
from advdmd.models.sampler import SamplerConfig
from advdmd.recipes.registry import has_miniature
from advdmd.types import Edit, Prompt


def sample(
    model: str | Path,
    prompts: Sequence[Prompt],
    out: str | Path,
    sampler: SamplerConfig | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> list[Path]:
    """Sample prompts with a model into the folder `out`; returns the files, one per prompt.

    prompts: for a model that edits images `edits_of` them. model: shipped name, pipeline folder or hub id. sampler: by default
    that of the model's metadata. device, dtype: as in `loading.load_for_sampling`.

    Raises ValueError if the model cannot be loaded, or does not know a word of a prompt.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts={prompts[:60]!r} is one text: give a list of prompts")
    out = Path(out)
    backbone, default = loading.load_for_sampling(str(model), device, dtype)
    check_prompts(backbone, prompts)
    generate = image_sampler(backbone, backbone.net, sampler or default)
    images = generate(prompts, [("sample", k, seed) for k in range(len(prompts))])
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{k:03d}.png" for k in range(len(prompts))]
    for path, image in zip(paths, images, strict=True):
        write_image(path, Image.fromarray(image))
    return paths


def edits_of(prompts: Sequence[str], sources: Sequence[Path]) -> list[Edit]:
    """Prompts with the images that they edit: one for all, or the same number for each, in order.

    Raises ValueError on other numbers, on none, and on an image that is not there.
    """
    if not (prompts and sources) or (len(sources) != 1 and len(sources) % len(prompts)):
        raise ValueError(
            f"--source: {len(sources)} images for {len(prompts)} prompts: give one for all, or the same number for each"
        )
    if missing := [f for f in sources if not f.expanduser().is_file()]:
        raise ValueError(f"--source: there is no image {missing[0]}")
    places = [ImagePlace(f.expanduser()) for f in sources]
    each = len(places) // len(prompts)
    return [Edit(p, tuple(places[k * each : (k + 1) * each] if each else places)) for k, p in enumerate(prompts)]


def check_prompts(backbone: Backbone, prompts: Sequence[Prompt]) -> None:
    """Raises ValueError if a model of the miniature does not know a word of a prompt, or cannot read all of it."""
    if has_miniature():
        from advdmd.mini.pipelines import is_mini_pipeline
        from advdmd.mini.prompts import check_prompt

        if is_mini_pipeline(backbone):
            for prompt in prompts:
                check_prompt(backbone, str(prompt))
