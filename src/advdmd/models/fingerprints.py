"""What tells two pipelines apart to a cache: what their encoders and tokenizers mean, however their files are written."""

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from advdmd.files import file_hash, folder_hash
from advdmd.models import hub
from advdmd.models.backbone import Backbone
from advdmd.models.loading import ENCODERS, absent_parts, read_index, read_metadata, silence_libraries, weight_files
from advdmd.models.pretrained import load_tokenizer
from advdmd.models.qwen_image_edit import VisionProcessor
from advdmd.types import Json

# Keys of a configuration that say who wrote it and how, not what it does.
BOOKKEEPING = ("transformers_version", "torch_dtype", "dtype", "architectures")
PROBES = (
    "a red circle",
    "circle " * 2000,
    "",
    " ",
    "Ünïcode, 12.5 %! «naïve» 日本語 🙂",
    "CAPS and_under-scores\nnew line\t tab",
)


def encoder_fingerprint(path: Path, parts: Sequence[str] = ENCODERS) -> Json:
    """What decides how a pipeline folder encodes text and images.

    Its class, text length, and of every encoder the numbers and the configuration, of every tokenizer what it knows. The same
    pipeline that was saved again, in shards or by another version of the libraries, has the same fingerprint. parts: the
    sub-folders to read. Raises ValueError if a part cannot be read.
    """
    silence_libraries()
    index, metadata = read_index(path), read_metadata(path)
    found: Json = {"family": index["_class_name"], "t5_length": metadata.get("t5_length", 256)}
    absent = absent_parts(path, index)
    for part in parts:
        kind = index.get(part, [None, None])
        if kind[0] and part not in absent and any((path / part).glob("*")):
            try:
                found[part] = _part(path / part, kind)
            except ValueError:
                raise
            except Exception as e:  # whatever a damaged folder makes a library raise
                raise ValueError(f"{path / part} cannot be read: {e}") from None
    return found


def _part(folder: Path, kind: Sequence[str]) -> str:
    if folder.name == "processor":  # of which the image processor is more than the tokenizer
        about = VisionProcessor.from_pretrained(folder).images.to_dict()
        about = {k: v for k, v in about.items() if k not in ("image_processor_type", "processor_class")}
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    return _tokenizer(folder) if folder.name.startswith("tokenizer") else _model(folder, kind)


def _model(folder: Path, kind: Sequence[str]) -> str:
    """Hash of a model's distinct tensors, whatever their files and names, and of its configuration with all defaults."""
    import diffusers
    import transformers

    if kind[0] == "diffusers":
        cls: Any = getattr(diffusers, kind[1])
        config: Json = {**cls.load_config(folder, local_files_only=True)}
        known = inspect.signature(cls.__init__).parameters
        config = {k: p.default for k, p in known.items() if k != "self"} | {k: v for k, v in config.items() if k in known}
    else:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).to_dict()
    config = {k: v for k, v in config.items() if k not in BOOKKEEPING and not k.startswith("_")}
    tensors = sorted(set(_tensor_hashes(folder)))
    return hashlib.sha256(json.dumps([config, tensors], sort_keys=True, default=str).encode()).hexdigest()


def _tensor_hashes(folder: Path) -> Iterator[str]:
    """A hash of each tensor of numbers in a folder's safetensors. Integers are positions, which some versions leave out."""
    from safetensors import safe_open

    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                value = tensors.get_tensor(name)
                if value.is_floating_point():
                    digest = hashlib.sha256(f"{value.dtype} {list(value.shape)}".encode())
                    digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
                    yield digest.hexdigest()


def _tokenizer(folder: Path) -> str:
    """Hash of a tokenizer's vocabulary, of its special tokens, and of what it makes of texts of many kinds."""
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer(text).input_ids for text in PROBES]
    known = sorted(tokenizer.get_vocab().items())
    about = [known, ids, sorted(tokenizer.all_special_tokens), tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def file_fingerprint(path: Path) -> Json:
    """The fingerprint that caches of an earlier version hold: the bytes of the encoders' files."""
    index, metadata = read_index(path), read_metadata(path)
    found: Json = {"family": index["_class_name"], "t5_length": metadata.get("t5_length", 256)}
    for part in ENCODERS:
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
