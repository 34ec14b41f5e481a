"""Prompts and captioned images as people have them: text files, folders with metadata.jsonl, webdataset tars, datasets."""

import csv
import io
import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".jfif", ".bmp", ".tif", ".tiff", ".gif", ".avif")
SIDECAR_SUFFIXES = (".txt", ".caption")
CAPTION_KEYS, FILE_KEYS = ("text", "prompt", "caption"), ("file_name", "image")
TURNS = {  # EXIF orientation -> what puts the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SUPPORTED_SOURCES = (
    "a .txt of prompts, a .jsonl, a folder with metadata.jsonl or metadata.csv, a folder of images each with a .txt or "
    ".caption of the same name, a webdataset .tar or a folder of them, a saved dataset"
)


@dataclass(frozen=True)
class CaptionedImage:
    """A prompt, and one image of it: a file, the bytes of `member` of a tar file, from `start` on, or of a dataset's `row`."""

    prompt: str
    image: Path | None = None
    member: str = ""
    start: int = 0
    size: int = 0
    row: int | None = None

    @property
    def place(self) -> str:
        if self.row is not None:
            return f"{self.image}, row {self.row}"
        return f"{self.image}:{self.member}" if self.member else str(self.image)


def read_captioned_images(source: Path) -> list[CaptionedImage]:
    """Everything a source holds, in its order. Raises ValueError that names file and line of what cannot be used."""
    if source.is_dir():
        tars = sorted(source.glob("*.tar"))
        if (source / "metadata.jsonl").is_file():
            found = list(_jsonl(source / "metadata.jsonl"))
        elif (source / "state.json").is_file() and (source / "dataset_info.json").is_file():
            found = list(_dataset(source))
        elif (source / "dataset_dict.json").is_file():
            raise ValueError(f"{source} is a saved dataset of several splits: give the folder of one of them, such as train")
        elif (source / "metadata.csv").is_file():
            found = list(_csv(source / "metadata.csv"))
        elif tars:
            found = [e for tar in tars for e in _tar(tar)]
        else:
            found = _sidecars(source)
    elif not source.is_file():
        raise ValueError(f"{source}: no such file or folder; give {SUPPORTED_SOURCES}")
    elif source.suffix == ".txt":
        found = [CaptionedImage(line.strip()) for line in _text(source) if line.strip()]
    elif source.suffix == ".jsonl":
        found = list(_jsonl(source))
    elif source.suffix == ".tar":
        found = list(_tar(source))
    else:
        raise ValueError(f"{source}: give {SUPPORTED_SOURCES}")
    if not found:
        raise ValueError(f"{source} holds no prompts")
    return found


def _text(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text: {e}") from None


def _caption(row: Any, where: str) -> str:
    texts = next((row[k] for k in CAPTION_KEYS if isinstance(row, dict) and k in row), None)
    if not isinstance(texts, str) or not texts.strip():
        raise ValueError(f"{where}: needs an object with the caption under one of {', '.join(CAPTION_KEYS)}")
    if any("\ud800" <= c <= "\udfff" for c in texts):
        raise ValueError(f"{where}: the caption holds half a character (a lone surrogate)")
    return texts.strip()


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: {e}") from None


def _jsonl(path: Path) -> Iterator[CaptionedImage]:
    for n, line in enumerate(_text(path), 1):
        if line.strip():
            yield _row(path, f"{path}, line {n}", _json(line, f"{path}, line {n}"))


def _csv(path: Path) -> Iterator[CaptionedImage]:
    try:
        rows = list(csv.DictReader(io.StringIO("\n".join(_text(path)))))
    except csv.Error as e:
        raise ValueError(f"{path}: {e}") from None
    for n, row in enumerate(rows, 1):
        yield _row(path, f"{path}, row {n}", row)


def _sidecars(folder: Path) -> list[CaptionedImage]:
    """Images in a folder and its subfolders, each with its caption in a file of the same name.

    Images without a caption, or with an empty one, are skipped, and their number is printed.
    """
    files = sorted(
        f for f in folder.rglob("*") if not any(p.startswith((".", "__MACOSX")) for p in f.relative_to(folder).parts)
    )
    images = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()]
    found, skipped = [], 0
    for image in images:
        texts = [t for suffix in SIDECAR_SUFFIXES if (t := image.with_suffix(suffix)).is_file()]
        caption = " ".join("\n".join(_text(texts[0])).split()) if texts else ""
        if caption:
            found.append(CaptionedImage(_caption({"text": caption}, str(texts[0])), image))
        else:
            skipped += 1
    if not found:
        what = f"{len(images)} images without a caption" if images else "neither captions, .tar files nor images"
        raise ValueError(f"{folder} holds {what}: give {SUPPORTED_SOURCES}")
    if skipped:
        print(f"{folder}: {skipped} of {len(images)} images have no caption and are skipped", file=sys.stderr)
    return found


def _row(path: Path, where: str, row: Any) -> CaptionedImage:
    """A row of a metadata file: a caption, and the image that it names, if any, beside the file."""
    root, prompt = path.parent.resolve(), _caption(row, where)
    file = next((row[k] for k in FILE_KEYS if row.get(k)), None)
    if file is None:
        return CaptionedImage(prompt)
    image = root / str(file)
    if ".." in Path(str(file)).parts or not image.is_relative_to(root):  # links in the folder may lead out of it
        raise ValueError(f"{where}: {str(file)!r} leads out of the folder")
    try:
        image.resolve(strict=False)
        there = image.is_file()
    except (OSError, RuntimeError, ValueError) as e:  # a circle of links, a name that no file can have
        raise ValueError(f"{where}: {str(file)!r}: {e}") from None
    if not there:
        raise ValueError(f"{where}: there is no image {str(file)!r}")
    return CaptionedImage(prompt, image)


def _tar(path: Path) -> Iterator[CaptionedImage]:
    """Pairs KEY.jpg (or .png, .webp) and KEY.txt (or KEY.json with the caption); what lacks its other half is passed over.

    Nothing is ever unpacked to disk. Compressed tars are refused: an image is read from where it lies.
    """
    parts: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for m in tar:
                if m.isreg() and not m.issparse():
                    key, dot, kind = m.name.rpartition(".")
                    parts.setdefault(key, {})[f"{dot}{kind.lower()}"] = m
            for key, found in parts.items():
                image = next((found[k] for k in IMAGE_SUFFIXES if k in found), None)
                texts = next((found[k] for k in (".txt", ".json") if k in found), None)
                if image is None or texts is None:
                    continue
                where = f"{path}, {key}"
                file = tar.extractfile(texts)
                assert file is not None  # a regular file, as asked above
                text = file.read().decode("utf-8-sig")
                row = _json(text, where) if texts is found.get(".json") else {"text": text}
                yield CaptionedImage(_caption(row, where), path, image.name, image.offset_data, image.size)
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: {e}") from None


@cache
def _rows(folder: Path) -> tuple[Any, str | None]:
    """A dataset as the library's save_to_disk left it, and its first column of images, which are not decoded.

    Raises ValueError if it cannot be read.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{folder} is a saved dataset: it takes the datasets library, pip install 'advdmd[datasets]'"
        ) from None
    try:
        found: Any = datasets.load_from_disk(str(folder))
        image = next((k for k, v in found.features.items() if isinstance(v, datasets.Image)), None)
        found = found.select_columns([k for k in found.column_names if k == image or k in CAPTION_KEYS])
        if image:
            found = found.cast_column(image, datasets.Image(decode=False))
    except Exception as e:  # whatever a damaged folder makes the library raise
        raise ValueError(f"{folder} cannot be read as a dataset: {e}") from None
    return found, image


def _dataset(folder: Path) -> Iterator[CaptionedImage]:
    """Captions are under one of CAPTION_KEYS; without a column of images it is a list of prompts."""
    rows, column = _rows(folder)
    texts = next((k for k in CAPTION_KEYS if k in rows.column_names), None)
    if texts is None:
        raise ValueError(f"{folder}: captions are looked for in a column {' or '.join(CAPTION_KEYS)}, there is none")
    for n, text in enumerate(rows[texts]):
        yield CaptionedImage(
            _caption({"text": text}, f"{folder}, row {n}"), folder if column else None, row=n if column else None
        )


def _bytes(entry: CaptionedImage) -> bytes:
    assert entry.image is not None
    if entry.row is not None:
        rows, column = _rows(entry.image)
        image = rows[entry.row][column]
        if image["bytes"] is None:
            raise ValueError("the dataset holds a path instead of the image: save it with its images embedded")
        return image["bytes"]
    with open(entry.image, "rb") as file:
        file.seek(entry.start)
        return file.read(entry.size if entry.member else -1)


def image_size(entry: CaptionedImage) -> tuple[int, int]:
    """Height and width as its camera says. Raises ValueError that names the image if it cannot be read."""
    try:
        with Image.open(io.BytesIO(_bytes(entry))) as image:
            turned = _orientation(image) in (5, 6, 7, 8)
            width, height = image.size[::-1] if turned else image.size
            return height, width
    except Exception as e:  # whatever a damaged or hostile file makes the library raise
        raise ValueError(f"image {entry.place} cannot be read: {e}") from None


def load_image(entry: CaptionedImage, height: int, width: int) -> np.ndarray:
    """[3, H, W] float32 in [-1, 1]: turned as its camera says, scaled to cover the size, the middle cut out.

    Raises ValueError that names the image if it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(_bytes(entry))) as image:
            turn = TURNS.get(_orientation(image))
            image = _flat(image)
            image = ImageOps.fit(image if turn is None else image.transpose(turn), (width, height), Image.Resampling.LANCZOS)
    except Exception as e:  # whatever a damaged or hostile file makes the library raise
        raise ValueError(f"image {entry.place} cannot be read: {e}") from None
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1


def _flat(image: Image.Image) -> Image.Image:
    """The first frame in RGB, what is transparent on white; 16-bit greys scaled, not cut."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return _srgb(image, profile)


def _orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8; 1 where the EXIF data are damaged, as the pixels may still be sound."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever damaged data make the library raise
        return 1


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image in RGB; from its colour profile to sRGB if it has one that can be read."""
    if profile:
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" not in ImageCms.getProfileDescription(source).lower():
                plain = image if image.mode in ("RGB", "L", "CMYK") else image.convert("RGB")
                found = ImageCms.profileToProfile(plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
                return found if found is not None else image.convert("RGB")
    return image.convert("RGB")


def group_by_prompt(entries: Sequence[CaptionedImage]) -> tuple[list[str], list[list[CaptionedImage]]]:
    """Each prompt once, in order of appearance, and its distinct images."""
    found: dict[str, dict[str, CaptionedImage]] = {}
    for e in entries:
        images = found.setdefault(e.prompt, {})
        if e.image is not None:
            images[e.place] = e
    return list(found), [list(images.values()) for images in found.values()]
