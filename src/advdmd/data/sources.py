"""Prompts and captioned images as people have them: text, metadata files, images beside their captions, tars, datasets."""

import csv
import io
import json
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from advdmd.data.captioned_images import BYTES_KEYS, CaptionedImage, Columns, ImagePlace
from advdmd.data.image_files import PHOTO_SUFFIXES, image_suffixes, is_system_file, same_name
from advdmd.data.tables import parquet_file, saved_dataset
from advdmd.files import listed
from advdmd.types import Json

Row = Any  # of a metadata file or a table: whatever it holds, checked where it is read
SIDECAR_SUFFIXES = (".txt", ".caption", ".json")
KOHYA_FOLDER = re.compile(r"\d+_(.+)")  # repeats and the caption of images without one
SUPPORTED_SOURCES = (
    "a .txt of prompts, a .jsonl, .json or .csv, a folder with metadata.jsonl, .csv or .parquet, a folder of images each with "
    "a .txt, .caption or .json of the same name, a webdataset .tar or a folder of them, a saved dataset, .parquet files"
)


@dataclass
class _Findings:
    """What a source was not taken at its word in: counts of what is passed over, and faults, each with its place."""

    skipped: Counter[str] = field(default_factory=Counter[str])
    faults: list[str] = field(default_factory=list[str])
    notes: set[str] = field(default_factory=set[str])

    def report(self, source: Path) -> None:
        """Print the counts. Raises ValueError with the faults, all in one go."""
        if self.faults:
            raise ValueError(listed(self.faults))
        if self.skipped:
            counts = ", ".join(f"{what}: {n}" for what, n in sorted(self.skipped.items()))
            print(f"{source}: passed over: {counts}", file=sys.stderr)
        for note in sorted(self.notes):
            print(f"{source}: {note}", file=sys.stderr)


def read_captioned_images(source: Path, columns: Columns = Columns()) -> list[CaptionedImage]:  # noqa: B008
    """Everything a source holds, in its order.

    What is passed over is counted and printed: empty captions, images without one, files of the operating system. Raises
    ValueError that lists, with file and line, what cannot be used.
    """
    source, findings = source.expanduser(), _Findings()
    if source.is_dir():
        found = list(_folder(source, columns, findings))
    elif not source.is_file():
        raise ValueError(f"{source}: no such file or folder; give {SUPPORTED_SOURCES}")
    elif source.suffix == ".txt":
        found = [CaptionedImage(line.strip()) for line in _text(source) if line.strip()]
    elif source.suffix in METADATA:
        found = list(METADATA[source.suffix](source, columns, findings))
    elif source.suffix == ".tar":
        found = list(_tar(source, columns, findings))
    else:
        raise ValueError(f"{source}: give {SUPPORTED_SOURCES}")
    findings.report(source)
    if not found:
        raise ValueError(f"{source} holds no prompts: give {SUPPORTED_SOURCES}")
    return found


def _folder(folder: Path, columns: Columns, findings: _Findings) -> Iterable[CaptionedImage]:
    for suffix in (".jsonl", ".csv", ".parquet"):
        if (folder / f"metadata{suffix}").is_file():
            return METADATA[suffix](folder / f"metadata{suffix}", columns, findings)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _dataset(folder, columns, findings)
    if (folder / "dataset_dict.json").is_file():
        raise ValueError(f"{folder} is a saved dataset of several splits: give the folder of one of them, such as train")
    if tars := [f for f in sorted(folder.glob("*.tar")) if not is_system_file(f.relative_to(folder))]:
        return (e for tar in tars for e in _tar(tar, columns, findings))
    if found := _sidecars(folder, columns, findings):
        return found
    tables = [f for f in sorted(folder.rglob("*.parquet")) if not is_system_file(f.relative_to(folder))]
    if not tables:
        images = findings.skipped["images without a caption"]
        what = f"{images} images without a caption" if images else "neither captions, .tar files nor images"
        if inner := sorted(str(f.relative_to(folder)) for f in folder.glob("*/metadata.*")):
            what = f"{inner[0]}: give that folder. Directly it holds {what}"
        raise ValueError(f"{folder} holds {what}: give {SUPPORTED_SOURCES}")
    splits = sorted({re.sub(r"(-\d+-of-\d+|-?\d+)$", "", f.stem) for f in tables})
    if len(splits) > 1:
        raise ValueError(
            f"{folder} holds .parquet files of several splits ({', '.join(splits)}): give one file, or one's folder"
        )
    return (e for table in tables for e in _parquet(table, columns, findings))


def _text(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text: {e}") from None


def _json(text: str, where: str) -> Row:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: {e}") from None


def _captions(row: Row, where: str, columns: Columns, findings: _Findings) -> list[str]:
    """The captions of a row: one, or those of a list. None if it is empty, which is counted, or wrong, which is a fault."""
    key = next((k for k in columns.captions if isinstance(row, dict) and k in row), None)
    if key is None:
        there = f"; it has {', '.join(map(str, row))}" if isinstance(row, dict) and row else ""
        findings.faults.append(f"{where}: needs an object with the caption under {' or '.join(columns.captions)}{there[:200]}")
        return []
    texts = row[key] if isinstance(row[key], list) else [row[key]]
    found = [t.strip() for t in texts if isinstance(t, str)]
    if any("\ud800" <= c <= "\udfff" for t in found for c in t):
        findings.faults.append(f"{where}: the caption holds half a character (a lone surrogate)")
        return []
    if any(t is not None and not isinstance(t, str) and t == t for t in texts):  # a table's empty field is not a number
        findings.faults.append(f"{where}: the caption under {key} is no text")
        return []
    found = [t for t in found if t]
    if not found:
        findings.skipped["empty captions"] += 1
    return found


def _one_line(text: str, columns: Columns) -> Json:
    """The caption of a text file as a row: its lines are one caption."""
    return {columns.captions[0]: " ".join(text.split())}


def _jsonl(path: Path, columns: Columns, findings: _Findings) -> Iterator[CaptionedImage]:
    for n, line in enumerate(_text(path), 1):
        if line.strip():
            where = f"{path}, line {n}"
            yield from _metadata_row(path, where, _json(line, where), columns, findings)


def _json_file(path: Path, columns: Columns, findings: _Findings) -> Iterator[CaptionedImage]:
    """A list of rows, or kohya's object of image -> row."""
    found = _json("\n".join(_text(path)), str(path))
    if isinstance(found, dict):
        found = [{columns.files[0]: k, **v} if isinstance(v, dict) else v for k, v in found.items()]
    for n, row in enumerate(found if isinstance(found, list) else [found], 1):
        yield from _metadata_row(path, f"{path}, entry {n}", row, columns, findings)


def _csv(path: Path, columns: Columns, findings: _Findings) -> Iterator[CaptionedImage]:
    csv.field_size_limit(2**24)
    try:
        rows = list(csv.DictReader(io.StringIO("\n".join(_text(path)))))
    except csv.Error as e:
        raise ValueError(f"{path}: {e}") from None
    for n, row in enumerate(rows, 1):
        yield from _metadata_row(path, f"{path}, row {n}", row, columns, findings)


def _metadata_row(path: Path, where: str, row: Row, columns: Columns, findings: _Findings) -> Iterator[CaptionedImage]:
    """A row of a metadata file: its captions, and the image and source images that it names, if any, beside the file."""
    prompts = _captions(row, where, columns, findings)
    if not prompts:
        return
    if missing := [k for k in (columns.image, columns.source) if k and k not in row]:
        findings.faults.append(f"{where}: there is no {missing[0]}; it has {', '.join(map(str, row))}")
        return
    name, before = (next((row[k] for k in keys if row.get(k)), None) for keys in (columns.files, columns.sources))
    names = before if isinstance(before, list) else [before] if before else []
    if wrong := [n for n in names if not (isinstance(n, str) and n)]:
        findings.faults.append(f"{where}: a source image is {wrong[0]!r}: give the name of a file, or a list of names")
        return
    try:
        image = ImagePlace(_beside(path.parent, str(name))) if name else None
        sources = tuple(ImagePlace(_beside(path.parent, str(n))) for n in names)
    except ValueError as e:
        findings.faults.append(f"{where}: {e}")
        return
    yield from (CaptionedImage(p, image, sources) for p in prompts)


def _beside(folder: Path, name: str) -> Path:
    """The file of a name in a folder, in whichever normal form its letters are. Raises ValueError if there is none."""
    root = folder.resolve()
    image = root / name
    if ".." in Path(name).parts or not image.is_relative_to(root):  # links in the folder may lead out of it
        raise ValueError(f"{name!r} leads out of the folder")
    try:
        image.resolve(strict=False)
        there = image.is_file()
    except (OSError, RuntimeError, ValueError) as e:  # a circle of links, a name that no file can have
        raise ValueError(f"{name!r}: {e}") from None
    if there:
        return image
    for other in _names(image.parent).get(same_name(image.name), ()):
        if other.is_file():
            return other
    raise ValueError(f"there is no image {name!r}")


@lru_cache(maxsize=64)
def _names(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by their names in one normal form."""
    found: dict[str, list[Path]] = {}
    for f in folder.iterdir() if folder.is_dir() else ():
        found.setdefault(same_name(f.name), []).append(f)
    return found


def _sidecars(folder: Path, columns: Columns, findings: _Findings) -> list[CaptionedImage]:
    """Images in a folder and its subfolders, each with its captions in a file of the same name (kohya, img2dataset).

    In kohya's folders "10_a lamp" the name is the caption of images without one.
    """
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    system = [f for f in files if is_system_file(f.relative_to(folder))]
    files = [f for f in files if not is_system_file(f.relative_to(folder))]
    stems = {same_name(str(f.with_suffix(""))): f for f in files if f.suffix.lower() in SIDECAR_SUFFIXES}
    texts = {(key, f.suffix.lower()): f for f in files if (key := same_name(str(f.with_suffix("")))) in stems}
    found: list[CaptionedImage] = []
    for image in files:
        key, kind = same_name(str(image.with_suffix(""))), image.suffix.lower()
        if kind not in image_suffixes():
            if kind in PHOTO_SUFFIXES:
                findings.skipped[f"images that Pillow cannot read ({kind})"] += 1
            continue
        text = next((texts[key, s] for s in SIDECAR_SUFFIXES if (key, s) in texts), None)
        if text is not None:
            content = "\n".join(_text(text))
            row = _json(content, str(text)) if text.suffix.lower() == ".json" else _one_line(content, columns)
            found += [CaptionedImage(p, ImagePlace(image)) for p in _captions(row, str(text), columns, findings)]
        elif name := KOHYA_FOLDER.fullmatch(image.parent.name):
            found.append(CaptionedImage(name[1].strip(), ImagePlace(image)))
            findings.notes.add("kohya's numbers of repeats in folder names are not used: every image counts once")
        else:
            findings.skipped["images without a caption"] += 1
    if found and system:
        findings.skipped["files of the operating system"] += len(system)
    return found


def _tar(path: Path, columns: Columns, findings: _Findings) -> Iterator[CaptionedImage]:
    """Pairs KEY.jpg (or another image) and KEY.txt, .caption or .json. What lacks its other half is counted.

    Nothing is ever unpacked to disk. Compressed tars are refused: an image is read from where it lies.
    """
    parts: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for m in tar:
                if m.isreg() and not m.issparse():
                    if is_system_file(PurePosixPath(m.name.removeprefix("./"))):
                        findings.skipped["files of the operating system"] += 1
                        continue
                    key, dot, kind = m.name.rpartition(".")
                    parts.setdefault(same_name(key), {})[f"{dot}{kind.lower()}"] = m
            for key, found in parts.items():
                image = next((m for kind, m in found.items() if kind in image_suffixes()), None)
                texts = next((found[k] for k in SIDECAR_SUFFIXES if k in found), None)
                if image is None or texts is None:
                    findings.skipped["images without a caption" if image else "captions without an image"] += 1
                    continue
                where = f"{path}, {key}"
                file = tar.extractfile(texts)
                assert file is not None  # a regular file, as asked above
                text = file.read().decode("utf-8-sig")
                row = _json(text, where) if texts is found.get(".json") else _one_line(text, columns)
                for prompt in _captions(row, where, columns, findings):
                    yield CaptionedImage(prompt, ImagePlace(path, image.name, image.offset_data, image.size))
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: {e}") from None


def _dataset(folder: Path, columns: Columns, findings: _Findings) -> Iterator[CaptionedImage]:
    """Without a column of images it is a list of prompts."""
    import datasets

    rows = saved_dataset(folder)
    images = [k for k, v in rows.features.items() if isinstance(v, datasets.Image)]
    yield from _table(folder, rows.column_names, images, lambda k: rows[k], columns, findings)


def _parquet(path: Path, columns: Columns, findings: _Findings) -> Iterator[CaptionedImage]:
    """Rows with their images in them, or metadata of files beside it."""
    table, names = parquet_file(path), list(parquet_file(path).schema_arrow.names)
    kinds = {f.name: str(f.type) for f in table.schema_arrow}
    images = [k for k in names if "binary" in kinds[k] and k in {*BYTES_KEYS, columns.image, *columns.sources}]
    try:
        if images or not any(k in names for k in columns.files):
            yield from _table(path, names, images, lambda k: table.read([k]).column(k).to_pylist(), columns, findings)
            return
        for n, row in enumerate(table.read().to_pylist()):
            yield from _metadata_row(path, f"{path}, row {n}", row, columns, findings)
    except OSError as e:
        raise ValueError(f"{path} cannot be read as a parquet file: {e}") from None


def _table(
    place: Path,
    names: Sequence[str],
    images: Sequence[str],
    read: Callable[[str], Sequence[Row]],
    columns: Columns,
    findings: _Findings,
) -> Iterator[CaptionedImage]:
    """Rows of a table with a column of captions and, perhaps, of images and of source images, both among the columns `images`.

    read(name): a column.
    """
    text = next((k for k in columns.captions if k in names), None)
    if text is None:
        raise ValueError(
            f"{place}: captions are looked for in a column {' or '.join(columns.captions)}, there are {', '.join(names)}: name "
            "one with --caption-column"
        )
    if wrong := [k for k in (columns.image, columns.source) if k and k not in images]:
        raise ValueError(f"{place}: there is no column {wrong[0]} of images, there are {', '.join(images) or 'none'}")
    source = next((k for k in columns.sources if k in images), None)
    column = columns.image or next((k for k in sorted(images, key=lambda k: k in columns.sources) if k != source), None)
    if not source and (named := [k for k in columns.sources if k in names]):
        raise ValueError(
            f"{place}: the column {named[0]} has not one image in each row: embed it, or give metadata that names files, which "
            "may have lists"
        )
    used = [k for k in (column, source) if k]
    there = [[v is not None for v in read(k)] for k in used] if place.is_file() else []
    for n, value in enumerate(read(text)):
        if not all(rows[n] for rows in there):
            findings.skipped["rows without an image"] += 1
            continue
        image, before = (ImagePlace(place, row=n, column=k) if k else None for k in (column, source))
        for prompt in _captions({columns.captions[0]: value}, f"{place}, row {n}", columns, findings):
            yield CaptionedImage(prompt, image, (before,) if before else ())


METADATA = {".jsonl": _jsonl, ".json": _json_file, ".csv": _csv, ".parquet": _parquet}
