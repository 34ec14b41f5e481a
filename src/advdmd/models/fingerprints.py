"""What tells two pipelines apart to a cache: hashes of their encoders, and of how they tokenize prompts."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from advdmd.files import file_hash, folder_hash
from advdmd.models import hub
from advdmd.models.backbone import Backbone
from advdmd.models.loading import ENCODERS, read_index, read_metadata
from advdmd.types import Json


def encoder_fingerprint(path: Path, parts: Sequence[str] = ENCODERS) -> Json:
    """What decides how a pipeline folder encodes text and images.

    Its class, text length, and the hash of every encoder's files.

    parts: the sub-folders to hash.
    """
    index, metadata = read_index(path), read_metadata(path)
    found: Json = {"family": index["_class_name"], "t5_length": metadata.get("t5_length", 256)}
    for part in parts:
        if index.get(part, [None])[0] and any((path / part).glob("*")):
            used = (f for f in (path / part).iterdir() if f.is_file() and not any(f.match(v) for v in hub.DTYPE_VARIANTS))
            found[part] = folder_hash({f.name: file_hash(f) for f in used})
    return found


def tokenization_fingerprint(backbone: Backbone) -> str:
    """Hash of the token ids of a short and of an endless prompt.

    Of the prompt template and the text length, which no file holds.
    """
    ids = backbone.tokenize(["a red circle", "circle " * 2000])
    return hashlib.sha256(repr(ids.tolist()).encode()).hexdigest()
