"""Files that are whole or not there: temporary name, fsync, rename; and what their bytes hash to."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the tensor library says of a full disk is an OSError like any other, with the file's name."""
    try:
        yield
    except SafetensorError as e:
        raise OSError(f"{path} cannot be written ({e}): make room there and run the same command again") from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename: a kill or a full disk leaves the old file whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _told(path):
            write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder beside `path`, then put it in its place; a stop before that leaves the old one whole."""
    making, old = (path.with_name(f".{path.name}.{w}") for w in ("making", "old"))
    for leftover in (making, old):
        shutil.rmtree(leftover, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _told(path):
        write(making)
    if path.exists():
        path.rename(old)
    making.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda p: p.write_text(text))


def folder_hash(files: Mapping[str, str]) -> str:
    """Of files' names and their hashes."""
    return hashlib.sha256("".join(f"{k} {v}\n" for k, v in sorted(files.items())).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Of a file's bytes; of a folder: its files' `folder_hash`."""
    if path.is_dir():
        return folder_hash({f.name: file_hash(f) for f in path.iterdir() if f.is_file()})
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
