"""Pipeline folders to backbones: shipped names, diffusers folders, and students we exported."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from advdmd.files import file_hash, folder_hash, read_object, read_tensors
from advdmd.models import hub
from advdmd.models.backbone import Backbone
from advdmd.models.qwen_image import QwenImage
from advdmd.models.sampler import SamplerConfig
from advdmd.models.sd3 import SD3
from advdmd.models.target_time import attach_zero_target
from advdmd.models.z_image import ZImage

SHIPPED = ("mini-sd3", "mini-sd35", "mini-qwen")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
ENCODERS = (*TEXT_ENCODERS, "tokenizer", "tokenizer_2", "tokenizer_3", "vae")
TARGET_TIME = "target_time.safetensors"  # what a TwinFlow student needs beside its pipeline
HASH_KEY = "transformer_sha256"  # in a note: of the weights it was written for
EXPORT_AGAIN = "export or download it again"
METADATA_FILE = "advdmd.json"  # beside a pipeline: how it wants to be sampled, and what as_backbone must know
# Of a pipeline on the hub: its parts, and not the same weights once more in files for other programs, which are there too.
PIPELINE_FILES = (
    "*.json",
    TARGET_TIME,
    *(f"{part}/{kind}" for part in ("transformer", "scheduler", *ENCODERS) for kind in hub.SAFE_FILES),
)
DESCRIPTION_FILES = ("model_index.json", "transformer/config.json", METADATA_FILE)  # what it says of itself


def shipped_or_path(name: str | Path) -> Path:
    """The folder of a shipped teacher, or a path as it is."""
    return Path(str(files("advdmd") / "mini" / "teachers" / str(name))) if str(name) in SHIPPED else Path(name)


def pipeline_folder(name: str, which: Sequence[str] = PIPELINE_FILES) -> Path:
    """`located`, or fetched from the hub (the files `which`), and checked: raises ValueError if it is not a pipeline."""
    path = shipped_or_path(name)
    if not path.exists() and hub.HUB_ID.fullmatch(name):
        path = hub.download(name, which)
    if not (path / "model_index.json").is_file():
        raise ValueError(
            f"{name!r} is neither a shipped model ({', '.join(SHIPPED)}) nor a diffusers pipeline folder (no "
            "model_index.json); advdmd pretrain makes teachers of the miniature"
        )
    return path


def weights_file(folder: Path) -> Path:
    """The weights that tell a pipeline or an autoencoder from another."""
    found = [f for f in (folder / "transformer", folder) if (f / "diffusion_pytorch_model.safetensors").is_file()]
    if not found:
        raise ValueError(f"{folder} holds no diffusion_pytorch_model.safetensors: name a pipeline or a vae folder")
    return found[0] / "diffusion_pytorch_model.safetensors"


def read_metadata(path: Path) -> dict[str, Any]:
    """What a folder says of itself, but for the hash that `intact` asks for; empty if it is not ours."""
    return {k: v for k, v in _metadata(path).items() if k != HASH_KEY}


def _metadata(path: Path) -> dict[str, Any]:
    return read_object(path / METADATA_FILE, way_out=EXPORT_AGAIN) if (path / METADATA_FILE).is_file() else {}


def _weights_hash(path: Path) -> str:
    return folder_hash({f.name: file_hash(f) for f in (path / "transformer").glob("*.safetensors")})


def verify_weights(path: Path) -> None:
    """Raises ValueError if a pipeline's transformer has not the weights that its note was written for."""
    wanted = _metadata(path).get(HASH_KEY)
    if wanted and _weights_hash(path) != wanted:
        raise ValueError(
            f"{path / 'transformer'} is damaged (its weights have not the hash in {METADATA_FILE}): {EXPORT_AGAIN}, or delete {HASH_KEY} there if "
            "they were changed on purpose"
        )


def read_index(path: Path) -> dict[str, Any]:
    """What a diffusers folder says it is made of."""
    return read_object(path / "model_index.json", "_class_name", way_out=EXPORT_AGAIN)


def silence_libraries() -> None:
    """No warnings and no progress bars of the libraries' own."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # before anything imports it: it misses kernels nobody asked for
    import transformers
    from diffusers.utils import logging as diffusers_logging

    for library in (transformers.logging, diffusers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def load_pipeline(
    path: Path, encoders: bool = True, dtype: torch.dtype = torch.float32, text: torch.dtype = torch.float32
) -> Any:
    """A diffusers pipeline from a local folder, quietly; never runs code from it and never reaches a network.

    `encoders`: without them the text encoders stay on disk, for runs whose text is encoded already. `dtype` is the
    transformer's, `text` the text encoders'; the autoencoder is float32.
    """
    import diffusers

    silence_libraries()
    index = read_index(path)
    known = ("StableDiffusion3Pipeline", "QwenImagePipeline", "ZImagePipeline")
    if index.get("_class_name") not in known:
        raise ValueError(f"{path} holds a {index.get('_class_name')}: {', '.join(known)} are supported")
    # A pipeline saved without its third encoder must be told so again when it is loaded.
    absent = {k: None for k in ("text_encoder_3", "tokenizer_3") if index.get(k, [True])[0] is None}
    if not encoders:
        absent |= {k: None for k in TEXT_ENCODERS if k in index}
    dtypes = {"transformer": dtype, "default": torch.float32} | {k: text for k in TEXT_ENCODERS if k in index}
    try:
        pipe = getattr(diffusers, index["_class_name"]).from_pretrained(
            path, local_files_only=True, use_safetensors=True, dtype=dtypes, **absent
        )
    except Exception as e:  # whatever a broken folder makes the library raise
        raise ValueError(f"{path} cannot be loaded as a pipeline: {e}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_pipeline(pipe: Any, path: Path, note: dict[str, Any]) -> None:
    """A diffusers folder with its note; the folders its parts were read from (`_name_or_path`) are nobody else's business."""
    pipe.save_pretrained(path)
    for file in path.rglob("*.json"):
        config = json.loads(file.read_text())
        if "_name_or_path" in config:
            del config["_name_or_path"]
            file.write_text(json.dumps(config, indent=2) + "\n")
    (path / METADATA_FILE).write_text(json.dumps(note | {HASH_KEY: _weights_hash(path)}, indent=1))


def default_sampling(path: Path) -> SamplerConfig:
    """A folder's own way of sampling; a teacher without a note: 40 steps, guidance 4."""
    try:
        return SamplerConfig(**read_metadata(path).get("sampling", {"steps": 40, "guidance": 4.0}))
    except TypeError as e:
        raise ValueError(f"{path / METADATA_FILE}: {e}") from None


def backbone_from_pipeline(pipe: Any, note: dict[str, Any]) -> Backbone:
    """The backbone of a pipeline; its note may say `t5_length` (SD3) and the latents' `side`."""
    kind = type(pipe).__name__
    if kind == "QwenImagePipeline":
        return QwenImage(pipe, side=note.get("side", pipe.default_sample_size))
    if kind == "ZImagePipeline":
        return ZImage(pipe, side=note.get("side", 128))
    return SD3(pipe, t5_length=note.get("t5_length", 256), side=note.get("side"))


def load(
    name: str,
    encoders: bool = True,
    dtype: torch.dtype = torch.float32,
    text: torch.dtype = torch.float32,
    resolution: int | None = None,
) -> tuple[Backbone, SamplerConfig]:
    """Backbone and its own way of sampling, at another side in pixels if told; the rest as in `load_pipeline`.

    Raises ValueError if the autoencoder or the transformer cannot do that side, or if the transformer's files are not those
    that its note was written for.
    """
    path = pipeline_folder(name)
    verify_weights(path)
    pipe, note = load_pipeline(path, encoders, dtype, text), read_metadata(path)
    if resolution is not None:
        scale = pipe.vae_scale_factor
        if resolution < 1 or resolution % scale:
            raise ValueError(f"resolution={resolution}: a multiple of {scale}, of which this autoencoder makes one latent")
        note = note | {"side": resolution // scale}
    backbone = backbone_from_pipeline(pipe, note)
    if (path / TARGET_TIME).is_file():
        attach_zero_target(
            backbone.net, read_tensors(path / TARGET_TIME, "standing", way_out=EXPORT_AGAIN)["standing"], backbone.time_scale
        )
    backbone.net.requires_grad_(False).eval()
    own = default_sampling(path)
    if pipe.scheduler.config.get("use_dynamic_shifting") and "sampling" not in note:
        own = replace(own, shift=dynamic_shift(pipe.scheduler.config, backbone.latent_shape[-1]))
    return backbone, own


def dynamic_shift(config: Any, side: int) -> float:
    """The time shift e^mu of a scheduler that shifts by image size, mu linear in the number of tokens, two latents on a side
    (Qwen-Image's pipeline; its `shift_terminal`, which moves the last step slightly, is left out here)."""
    tokens = (side // 2) ** 2
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    return math.exp(config["base_shift"] + slope * (tokens - config["base_image_seq_len"]))


def is_mini_pipeline(backbone: Backbone) -> bool:
    """Whether a pipeline is one of the miniature's, whose vocabulary is closed."""
    return len(backbone.pipe.tokenizer) < 2000


def is_mini_name(name: str) -> bool:
    """Whether a name is a local pipeline of the miniature: shipped, or with a note that says so."""
    path = shipped_or_path(name)
    if not (path / "model_index.json").is_file() or not (note := read_metadata(path)):
        return False
    return note.get("t5_length") == 0 or "side" in note


def resolve_device(asked: str) -> str:
    """Raises ValueError if a GPU is asked for and there is none."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch sees no GPU here; use device=cpu or auto")
    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def default_device(device: str) -> Iterator[None]:
    """Tensors are made on `device` inside, and sums on a card are as exact as the CPU's: convolutions would be rounded."""
    if device == "cpu":  # not otherwise: a default device costs the CPU's small calls time
        yield
        return
    before, rounded = torch.get_default_device(), torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)
        torch.backends.cudnn.allow_tf32 = rounded
