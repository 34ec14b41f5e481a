"""Prompts with their images, and the groups of them that an embedding cache keeps apart."""

from collections.abc import Sequence
from typing import NamedTuple

from advdmd.data import aspect_buckets
from advdmd.data.captioned_images import ImagePlace, image_size, prompt_hash
from advdmd.files import listed
from advdmd.progress import Progress
from advdmd.types import Edit, Prompt


class Member(NamedTuple):
    """A prompt, its hash, and its images, as far as they belong to one size."""

    prompt: Prompt
    key: str
    images: tuple[ImagePlace, ...]


def members_of(prompts: Sequence[Prompt], images: Sequence[Sequence[ImagePlace]]) -> list[Member]:
    """Prompts with their images. Source images are read: by their bytes edits are known, wherever they lie now.

    Raises ValueError that lists source images whose bytes cannot be had.
    """
    found, broken = list[Member](), list[str]()
    progress = Progress("reading source images", len(prompts)) if isinstance(prompts[0], Edit) else None
    for prompt, own in zip(prompts, images, strict=True):
        if progress:
            progress(len(found) + len(broken) + 1)
        try:
            found.append(Member(prompt, prompt_hash(prompt), tuple(own)))
        except (OSError, ValueError) as e:
            places = ", ".join(s.place for s in prompt.sources) if isinstance(prompt, Edit) else prompt
            broken.append(f"image {places} cannot be read: {e}")
    if broken:
        raise ValueError(listed(broken))
    return found


def by_aspect_ratio(
    members: Sequence[Member], choices: Sequence[aspect_buckets.Size]
) -> dict[aspect_buckets.Size, list[Member]]:
    """For each size the prompts with the images that are nearest to it. Raises ValueError that lists images without a size."""
    found: dict[aspect_buckets.Size, dict[str, list[ImagePlace]]] = {}
    broken: list[str] = []
    for member in members:
        for image in member.images:
            try:
                size = aspect_buckets.nearest_bucket(choices, image_size(image))
            except ValueError as e:
                broken.append(str(e))
                continue
            found.setdefault(size, {}).setdefault(member.key, []).append(image)
    if broken:
        raise ValueError(listed(broken))
    prompts = {m.key: m.prompt for m in members}
    return {size: [Member(prompts[k], k, tuple(own)) for k, own in rows.items()] for size, rows in sorted(found.items())}


def by_source_images(members: Sequence[Member]) -> dict[int, list[Member]]:
    """Prompts by their number of source images: conditions of one pass have as many. Texts have none."""
    found: dict[int, list[Member]] = {}
    for m in members:
        found.setdefault(len(m.prompt.sources) if isinstance(m.prompt, Edit) else 0, []).append(m)
    return dict(sorted(found.items()))
