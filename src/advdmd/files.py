"""Files that are whole or not there: temporary name, fsync, rename; what their bytes hash to; and reading them with a word on
what is wrong."""

import errno
import glob
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from advdmd.types import Json

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
SHOWN = 20  # faults that are listed at once
STALE = 600.0  # seconds after which a half-written file of a process that is gone is removed


@contextmanager
def name_file_in_errors(path: Path) -> Generator[None, None, None]:
    """Inside, a full disk raises an OSError that names the file, whatever a library raises.

    Errors of other files stay as they are.
    """
    try:
        yield
    except SafetensorError as e:
        raise OSError(f"{path} cannot be written ({e}): make room there and run the same command again") from None
    except OSError as e:
        if e.filename and not str(e.filename).startswith((str(path), str(path.with_name(f".{path.name}.")))):
            raise
        hint = ": make room there and run the same command again" if e.errno in FULL else ""
        named = OSError(f"{path} cannot be written ({e.strerror or e}){hint}")
        named.errno = e.errno
        raise named from None


def _sync(path: Path) -> None:
    """Have the disk keep a file's bytes, or a folder's names where its file system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as e:
        if not path.is_dir() or e.errno in (*FULL, errno.EIO):
            raise


def _readable(path: Path) -> None:
    """Give a new file or folder the usual rights: safetensors makes files that others cannot read."""
    mask = os.umask(0o022)
    os.umask(mask)
    with suppress(OSError):  # a file system without rights
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _sweep(path: Path) -> None:
    """Remove what killed processes of this machine left of their attempts to write `path`, when it is STALE."""
    processes = Path("/proc")
    if not processes.is_dir():
        return
    for half in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(platform.node())}.*"):
        pid = half.suffix[1:]
        with suppress(OSError):
            if pid.isdigit() and not (processes / pid).exists() and time.time() - half.stat().st_mtime >= STALE:
                half.unlink()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename: a kill or a full disk leaves the old file whole.

    Raises OSError that names the file.
    """
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        with name_file_in_errors(path):
            write(temporary)
            _readable(temporary)
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder beside `path`, then put it in its place; a stop before that leaves the old one whole.

    Raises OSError that names the folder.
    """
    making, old = (path.with_name(f".{path.name}.{w}") for w in ("making", "old"))
    if old.exists() and not path.exists():
        old.rename(path)  # a stop between the two renames below
    for leftover in (making, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with name_file_in_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(making)
            for file in (*making.rglob("*"), making):
                _readable(file)
                _sync(file)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
        if path.exists():
            path.rename(old)
        making.rename(path)
        _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises OSError that names the file."""
    write_atomically(path, lambda p: p.write_text(text))


def write_image(path: Path, image: Image.Image) -> None:
    """Write a PNG, whole or not at all. Raises OSError that names the file."""
    write_atomically(path, lambda p: image.save(p, format="PNG"))


def _complete(found: Mapping[str, object], keys: tuple[str, ...]) -> None:
    if lacking := [k for k in keys if k not in found]:
        raise ValueError(f"{', '.join(lacking)} missing")


def _object(text: str, keys: tuple[str, ...]) -> Json:
    """Raises ValueError unless the text is a JSON object with these keys."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError("not an object")
    row = cast(Json, found)
    _complete(row, keys)
    return row


def read_object(path: Path, *keys: str, hint: str) -> Json:
    """The object in a JSON file. Raises ValueError that names file, fault and `hint` if there is none with `keys`."""
    try:
        return _object(path.read_text(), keys)
    except OSError as e:
        raise ValueError(f"{path} cannot be read ({e.strerror}): {hint}") from None
    except ValueError as e:
        raise ValueError(f"{path} is damaged ({e}): {hint}") from None


def read_lines(path: Path, *keys: str, hint: str) -> list[Json]:
    """The objects in a file with one on each line; a last line that a kill cut short has no end and is left out. Raises
    ValueError that names file, line and fault."""
    found: list[Json] = []
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as e:
        raise ValueError(f"{path} cannot be read ({e.strerror}): {hint}") from None
    for n, line in enumerate(lines, 1):
        try:
            found.append(_object(line.decode(), keys))
        except ValueError as e:
            raise ValueError(f"{path}, line {n} is damaged ({e}): {hint}") from None
    return found


def read_tensors(path: Path, *keys: str, hint: str, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name, of any shape.

    Raises ValueError that names the file if it cannot be read, lacks one of `keys`, or has another hash than `sha256`.
    """
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    try:
        if sha256 is not None and file_hash(path) != sha256:
            raise ValueError("its sha256 differs from its record")
        found = load_file(path)
        _complete(found, keys)
        return found
    except (OSError, ValueError, SafetensorError) as e:
        raise ValueError(f"{path} is damaged ({e}): {hint}") from None


def folder_hash(files: Mapping[str, str]) -> str:
    """Hash of files' names and their hashes."""
    return hashlib.sha256("".join(f"{k} {v}\n" for k, v in sorted(files.items())).encode()).hexdigest()


def object_hash(row: Mapping[str, object]) -> str:
    """Hash of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Hash of a file's bytes; of a folder: the `folder_hash` of its files."""
    if path.is_dir():
        return folder_hash({f.name: file_hash(f) for f in path.iterdir() if f.is_file()})
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def listed(faults: Sequence[str]) -> str:
    """Faults, a line each, the first SHOWN of them."""
    more = [f"... and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    return "\n".join([*faults[:SHOWN], *more])
