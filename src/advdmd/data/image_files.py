"""Image files as people have them, as upright sRGB pixels: every format that Pillow reads, or a reason why not."""

import io
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import PurePath
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

TURNS = {  # EXIF orientation -> what puts the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
T = TypeVar("T")
DOCUMENTS = {"PDF", "EPS", "MPEG", "WMF", "HDF5", "GRIB", "BUFR", "FITS"}  # formats that Pillow registers, but not as photos
PHOTO_SUFFIXES = (".heic", ".heif", ".avif", ".jxl", ".svg", ".raw", ".dng", ".cr2", ".nef", ".arw")  # which may lack a decoder
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tIME")  # chunks that say something about the pixels, none of them
WHITE_IS_ZERO = 262, 0  # TIFF's tag of what a number means, and its value for inverted ones


@cache
def image_suffixes() -> frozenset[str]:
    """Endings of the files that can be read here, in lower case, with the dot."""
    known = Image.registered_extensions()
    return frozenset(k for k, kind in known.items() if kind in Image.OPEN and kind not in DOCUMENTS)


def is_system_file(path: PurePath) -> bool:
    """Whether a file was left by an operating system beside people's files, as far as its relative path tells."""
    return any(p.startswith((".", "__MACOSX")) or p.lower() in ("thumbs.db", "desktop.ini") for p in path.parts)


def same_name(text: str) -> str:
    """A file's name in one of the two normal forms of Unicode, in which systems write the same letters."""
    return unicodedata.normalize("NFC", text)


def upright_size(data: bytes) -> tuple[int, int]:
    """Height and width of an image as its camera says. Raises ValueError if it cannot be read."""

    def size(image: Image.Image) -> tuple[int, int]:
        width, height = image.size
        return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)

    return _read(data, size)


def decode(data: bytes) -> Image.Image:
    """The first frame of an image file, upright, in sRGB; what is transparent on white. Raises ValueError that says why not."""

    def pixels(image: Image.Image) -> Image.Image:
        turn, flat = TURNS.get(_orientation(image)), _flat(image)
        return flat if turn is None else flat.transpose(turn)

    return _read(data, pixels)


def fault_of(data: bytes) -> str:
    """Why an image file cannot be read; empty if it can."""
    try:
        decode(data)
    except ValueError as e:
        return str(e)
    return ""


def _read(data: bytes, use: Callable[[Image.Image], T]) -> T:
    """use(the opened image). A PNG whose text is broken is opened once more without its text."""
    try:
        try:
            with Image.open(io.BytesIO(data)) as image:
                return use(image)
        except Exception:
            plain = _without_text(data)
            if plain == data:
                raise
            with Image.open(io.BytesIO(plain)) as image:
                return use(image)
    except UnidentifiedImageError:
        raise ValueError("no image format that Pillow knows") from None
    except Exception as e:  # whatever a damaged or hostile file makes the library raise
        raise ValueError(str(e) or type(e).__name__) from None


def _without_text(data: bytes) -> bytes:
    """A PNG without its chunks of text; other bytes as they are."""
    if not data.startswith(PNG_SIGNATURE):
        return data
    out, at = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in PNG_TEXT:
            out.append(data[at:end])
        at = end
    return b"".join(out)


def _flat(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return _srgb(image, profile)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits, or floats in [0, 1], as bytes. Raises ValueError on numbers whose white is not known."""
    values = np.asarray(image, np.float64)
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError("floating-point grey values outside [0, 1]: save it with 8 or 16 bits")
        values = values * 255
    else:
        if image.mode == "I" and image.format != "PNG":  # of a PNG they are 16 bits in a wider type
            raise ValueError("grey values of 32 bits, whose white is not known: save it with 8 or 16 bits")
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("grey values outside 0 to 65535: save it with 8 or 16 bits")
        values = values / 257
    tag, inverted = WHITE_IS_ZERO
    tags = getattr(image, "tag_v2", {})
    return Image.fromarray((255 - values if tags.get(tag) == inverted else values).round().astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8; 1 where the EXIF data are damaged, as the pixels may still be sound."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever damaged data make the library raise
        return 1


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image in RGB; from its colour profile to sRGB if it has one that can be read, from Lab also without."""
    with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
        if profile or image.mode == "LAB":
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
            if image.mode == "LAB" or "srgb" not in ImageCms.getProfileDescription(source).lower():
                plain = image if image.mode in ("RGB", "L", "CMYK", "LAB") else image.convert("RGB")
                found = ImageCms.profileToProfile(plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
                return found if found is not None else image.convert("RGB")
    return image.convert("RGB")
