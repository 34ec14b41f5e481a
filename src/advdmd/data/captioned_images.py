"""A caption with one image of it and perhaps source images, wherever their bytes lie; and the names of their columns."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from advdmd.data.image_files import decode, upright_size
from advdmd.data.tables import embedded_bytes, parquet_rows, saved_dataset
from advdmd.types import Edit, Prompt

CAPTION_KEYS = ("text", "prompt", "caption", "en_caption")
FILE_KEYS = ("file_name", "image", "image_path", "img", "edited_image")
# Columns of parquet files with an image in each row.
BYTES_KEYS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "edited_image")
SOURCE_KEYS = ("source_image", "input_image", "original_image", "conditioning_image", "control_image")


class Columns(NamedTuple):
    """Names of the columns, or keys, of captions and images; None: the first of CAPTION_KEYS, FILE_KEYS or BYTES_KEYS there.

    source: of the images that captions edit, one or a list, by default the first of SOURCE_KEYS there. edits: whether these are
    wanted.
    """

    caption: str | None = None
    image: str | None = None
    source: str | None = None
    edits: bool = False

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.caption,) if self.caption else CAPTION_KEYS

    @property
    def files(self) -> tuple[str, ...]:
        return (self.image,) if self.image else FILE_KEYS

    @property
    def sources(self) -> tuple[str, ...]:
        """Empty where source images are not wanted."""
        return () if not self.edits else (self.source,) if self.source else SOURCE_KEYS


@dataclass(frozen=True)
class ImagePlace:
    """Where an image lies: a file; the bytes of `member` of a tar file, from `start` on; or what `column` of a dataset or
    parquet file has in `row`.
    """

    path: Path
    member: str = ""
    start: int = 0
    size: int = 0
    row: int | None = None
    column: str = ""

    @property
    def place(self) -> str:
        """In words."""
        if self.row is not None:
            return f"{self.path}, row {self.row}"
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    @property
    def state(self) -> tuple[object, ...]:
        """What changes when the image does, without reading it: its place, and size and time of its file."""
        stat = (self.path / "state.json" if self.path.is_dir() else self.path).stat()
        return self.place, stat.st_size, stat.st_mtime_ns

    def read(self) -> bytes:
        """The image's bytes. Raises OSError or ValueError if they cannot be had."""
        if self.row is not None:
            data = saved_dataset(self.path) if self.path.is_dir() else parquet_rows(self.path, self.column)
            return embedded_bytes(data[self.row][self.column])
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.size if self.member else -1)

    def load(self, height: int, width: int, data: bytes | None = None) -> Image.Image:
        """The image turned as its camera says, scaled to cover the size in pixels, the middle cut out.

        data: its bytes, where they were read before. Raises ValueError that names the image if it cannot be read.
        """
        try:
            return ImageOps.fit(decode(self.read() if data is None else data), (width, height), Image.Resampling.LANCZOS)
        except Exception as e:
            raise ValueError(f"image {self.place} cannot be read: {e}") from None


class CaptionedImage(NamedTuple):
    """A prompt, with an image of it, and with the source images of which that one is an edit."""

    prompt: str
    image: ImagePlace | None = None
    sources: tuple[ImagePlace, ...] = ()


def image_size(image: ImagePlace) -> tuple[int, int]:
    """Height and width as its camera says. Raises ValueError that names the image if it cannot be read."""
    try:
        return upright_size(image.read())
    except Exception as e:
        raise ValueError(f"image {image.place} cannot be read: {e}") from None


def load_image(image: ImagePlace, height: int, width: int, data: bytes | None = None) -> np.ndarray:
    """[3, H, W] float32 in [-1, 1], as `ImagePlace.load`."""
    return np.asarray(image.load(height, width, data), np.float32).transpose(2, 0, 1) / 127.5 - 1


def group_by_prompt(entries: Sequence[CaptionedImage]) -> tuple[list[Prompt], list[list[ImagePlace]]]:
    """Each prompt, or prompt with its source images, once, in order of appearance, and its distinct images."""
    found: dict[Prompt, dict[str, ImagePlace]] = {}
    for e in entries:
        images = found.setdefault(Edit(e.prompt, e.sources) if e.sources else e.prompt, {})
        if e.image is not None:
            images[e.image.place] = e.image
    return list(found), [list(images.values()) for images in found.values()]


def hash_of(values: Iterable[object]) -> str:
    """One hash of several values."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode())
    return digest.hexdigest()


def prompt_hash(prompt: Prompt) -> str:
    """What a prompt is known by: its words and, of an edit, the bytes of its source images.

    Raises OSError or ValueError if a source image cannot be had.
    """
    if isinstance(prompt, str):
        return hash_of([prompt])
    return hash_of([prompt.prompt, *(hashlib.sha256(source.read()).hexdigest() for source in prompt.sources)])
