"""A caption with one image of it, wherever its bytes lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from advdmd.data.image_files import decode, upright_size
from advdmd.data.tables import embedded_bytes, parquet_rows, saved_dataset


@dataclass(frozen=True)
class CaptionedImage:
    """A prompt, and one image of it.

    A file; the bytes of `member` of a tar file, from `start` on; or what `column` of a dataset or parquet file has in `row`.
    """

    prompt: str
    image: Path | None = None
    member: str = ""
    start: int = 0
    size: int = 0
    row: int | None = None
    column: str = ""

    @property
    def place(self) -> str:
        if self.row is not None:
            return f"{self.image}, row {self.row}"
        return f"{self.image}:{self.member}" if self.member else str(self.image)

    @property
    def state(self) -> tuple[object, ...]:
        """What changes when the image does, without reading it: its place, and size and time of its file."""
        assert self.image is not None
        stat = (self.image / "state.json" if self.image.is_dir() else self.image).stat()
        return self.place, stat.st_size, stat.st_mtime_ns

    def read(self) -> bytes:
        """The image's bytes. Raises OSError or ValueError if they cannot be had."""
        assert self.image is not None
        if self.row is not None:
            data = saved_dataset(self.image) if self.image.is_dir() else parquet_rows(self.image, self.column)
            return embedded_bytes(data[self.row][self.column])
        with open(self.image, "rb") as file:
            file.seek(self.start)
            return file.read(self.size if self.member else -1)


def image_size(entry: CaptionedImage) -> tuple[int, int]:
    """Height and width as its camera says. Raises ValueError that names the image if it cannot be read."""
    try:
        return upright_size(entry.read())
    except Exception as e:
        raise ValueError(f"image {entry.place} cannot be read: {e}") from None


def load_image(entry: CaptionedImage, height: int, width: int, data: bytes | None = None) -> np.ndarray:
    """[3, H, W] float32 in [-1, 1]: turned as its camera says, scaled to cover the size, the middle cut out.

    data: the image's bytes, where they were read before. Raises ValueError that names the image if it cannot be read.
    """
    try:
        image = decode(entry.read() if data is None else data)
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    except Exception as e:
        raise ValueError(f"image {entry.place} cannot be read: {e}") from None
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1


def group_by_prompt(entries: Sequence[CaptionedImage]) -> tuple[list[str], list[list[CaptionedImage]]]:
    """Each prompt once, in order of appearance, and its distinct images."""
    found: dict[str, dict[str, CaptionedImage]] = {}
    for e in entries:
        images = found.setdefault(e.prompt, {})
        if e.image is not None:
            images[e.place] = e
    return list(found), [list(images.values()) for images in found.values()]
