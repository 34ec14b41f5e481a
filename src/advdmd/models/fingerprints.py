"""What tells two pipelines apart to a cache: hashes of their encoders, and of how they tokenize prompts."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from advdmd.files import file_hash, folder_hash
from advdmd.models import hub
from advdmd.models.backbone import Backbone
from advdmd.models.loading import ENCODERS, read_index, read_metadata


def encoder_fingerprint(path: Path, parts: Sequence[str] = ENCODERS) -> dict[str, Any]:
    """What decides how a pipeline encodes text and images: its family, lengths, and the hash of every encoder's files; or of
    other `parts`."""
    index, note = read_index(path), read_metadata(path)
    found: dict[str, Any] = {"family": index["_class_name"], "t5_length": note.get("t5_length", 256)}
    for part in parts:
        if index.get(part, [None])[0] and any((path / part).glob("*")):
            read = (f for f in (path / part).iterdir() if f.is_file() and not any(f.match(v) for v in hub.DTYPE_VARIANTS))
            found[part] = folder_hash({f.name: file_hash(f) for f in read})
    return found


def tokenization_fingerprint(backbone: Backbone) -> str:
    """Of how a pipeline reads prompts: the hash of what its tokenizers make of a short and of an endless one, in which are its
    template and its length of text, which no file of its folder holds."""
    ids = backbone.tokenize(["a red circle", "circle " * 2000])
    return hashlib.sha256(repr(ids.tolist()).encode()).hexdigest()
