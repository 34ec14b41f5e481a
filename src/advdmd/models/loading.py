"""Pipeline folders to backbones: shipped names, diffusers folders, hub ids, and students that this package exported."""

import importlib
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import torch
from torch import nn

from advdmd.files import file_hash, folder_hash, read_object, read_tensors
from advdmd.models import hub
from advdmd.models.backbone import Backbone, Pipeline
from advdmd.models.devices import DTYPES, check_dtype, has_dtype, resolve_device
from advdmd.models.flux import Flux
from advdmd.models.flux2 import Flux2, Flux2Dev, chat_tokenizer
from advdmd.models.folder_kinds import no_pipeline
from advdmd.models.model_cards import card_sampling
from advdmd.models.qwen_image import QwenImage
from advdmd.models.qwen_image_edit import QwenImageEdit, VisionProcessor
from advdmd.models.sampler import SamplerConfig
from advdmd.models.sd3 import SD3
from advdmd.models.target_time import attach_zero_target
from advdmd.models.z_image import ZImage
from advdmd.types import Json

MODEL_PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
ENCODERS = (*TEXT_ENCODERS, "tokenizer", "tokenizer_2", "tokenizer_3", "processor", "vae")
TARGET_TIME = "target_time.safetensors"  # what a TwinFlow student needs beside its pipeline
HASH_KEY = "transformer_sha256"  # in the metadata: of the weights that it was written for
METADATA_FILE = "advdmd.json"  # beside a pipeline: how to sample it, and what `backbone_from_pipeline` must know
EXPORT_AGAIN = "export or download it again"
# Of a pipeline on the hub: its parts, and not the same weights once more in files for other programs.
PIPELINE_FILES = (
    "*.json",
    TARGET_TIME,
    *(f"{part}/{kind}" for part in ("transformer", "scheduler", *ENCODERS) for kind in hub.SAFE_FILES),
)
DESCRIPTION_FILES = ("model_index.json", "transformer/config.json", METADATA_FILE)
EDIT_PIPELINES = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")  # whose prompts are about source images
KNOWN_PIPELINES = (
    *("StableDiffusion3Pipeline", "QwenImagePipeline", "ZImagePipeline", "FluxPipeline"),
    *("Flux2KleinPipeline", "Flux2Pipeline"),
    *EDIT_PIPELINES,
)


def shipped() -> dict[str, Path]:
    """The teachers that are installed with this package, by name."""
    folder = Path(str(files("advdmd") / "mini" / "teachers"))
    return {f.name: f for f in sorted(folder.iterdir()) if f.is_dir()} if folder.is_dir() else {}


def shipped_or_path(name: str | Path) -> Path:
    """The folder of a shipped teacher, or a path, in which ~ is the home folder."""
    return shipped().get(str(name), Path(name).expanduser())


def pipeline_folder(name: str, which: Sequence[str] = PIPELINE_FILES) -> Path:
    """The folder of a shipped teacher, a local pipeline or one on the hub, of which the files `which` are fetched.

    Raises ValueError if it is not a pipeline.
    """
    path = shipped_or_path(name)
    if not path.exists() and hub.HUB_ID.fullmatch(name):
        path = hub.download(name, which)
    if not (path / "model_index.json").is_file():
        raise ValueError(no_pipeline(name, path, list(shipped())))
    return path


def weights_file(folder: Path) -> Path:
    """The file of weights by which a pipeline or an autoencoder is known. Raises ValueError if there is none."""
    found = [f for f in (folder / "transformer", folder) if (f / "diffusion_pytorch_model.safetensors").is_file()]
    if not found:
        raise ValueError(f"{folder} holds no diffusion_pytorch_model.safetensors: name a pipeline or a vae folder")
    return found[0] / "diffusion_pytorch_model.safetensors"


def weights_hash(path: Path) -> str:
    """The hash by which a pipeline's transformer is known: of its file, or of its shards. Raises ValueError without any."""
    sharded = len(weight_files(path / "transformer")) > 1
    return _weights_hash(path) if sharded else file_hash(weights_file(path))


def stored_dtype(path: Path, part: str = "transformer") -> torch.dtype:
    """The type of the numbers in a part of a pipeline; float32 where the file has others, such as integers, or is missing."""
    from safetensors import safe_open

    for file in weight_files(path / part):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                return _STORED.get(tensors.get_slice(name).get_dtype(), torch.float32)
    return torch.float32


_STORED = {"BF16": torch.bfloat16, "F16": torch.float16}


def read_metadata(path: Path) -> Json:
    """This package's metadata of a pipeline folder, without the hash that `verify_weights` reads; empty if there are none."""
    return {k: v for k, v in _metadata(path).items() if k != HASH_KEY}


def _metadata(path: Path) -> Json:
    return read_object(path / METADATA_FILE, hint=EXPORT_AGAIN) if (path / METADATA_FILE).is_file() else {}


def _weights_hash(path: Path) -> str:
    return folder_hash({f.name: file_hash(f) for f in weight_files(path / "transformer")})


def verify_weights(path: Path) -> None:
    """Raises ValueError if a pipeline's transformer does not have the weights that its metadata were written for."""
    wanted = _metadata(path).get(HASH_KEY)
    if wanted and _weights_hash(path) != wanted:
        raise ValueError(
            f"{path / 'transformer'} is damaged (its weights have not the hash in {METADATA_FILE}): {EXPORT_AGAIN}, or delete "
            f"{HASH_KEY} there if they were changed on purpose"
        )


def read_index(path: Path) -> Json:
    """The model_index.json of a diffusers folder: its class and its parts. Raises ValueError if it is damaged."""
    return read_object(path / "model_index.json", "_class_name", hint=EXPORT_AGAIN)


def pipeline_class(path: Path) -> str:
    """The class of a pipeline folder, or an empty string where there is no model_index.json."""
    return read_index(path)["_class_name"] if (path / "model_index.json").is_file() else ""


def edits_images(path: Path) -> bool:
    """Whether a pipeline folder holds a model whose prompts are about a source image."""
    return pipeline_class(path) in EDIT_PIPELINES


def check_text_to_image(pipeline: str) -> None:
    """Raises ValueError if a class of pipelines edits images, where prompts come without source images."""
    if pipeline in EDIT_PIPELINES:
        raise ValueError(f"a {pipeline} edits images, and here prompts have no source images: use advdmd sample --source")


def silence_libraries() -> None:
    """Turn off warnings and progress bars of transformers, diffusers and bitsandbytes."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # before anything imports it: it misses kernels nobody needs
    import transformers
    from diffusers.utils import logging as diffusers_logging

    for library in (transformers.logging, diffusers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def load_pipeline(
    path: Path,
    encoders: bool = True,
    dtype: torch.dtype = torch.float32,
    text_dtype: torch.dtype = torch.float32,
) -> Pipeline:
    """A diffusers pipeline from a local folder; never runs code from it and never reaches a network.

    encoders: False leaves the text encoders on disk, for runs whose text is encoded already. dtype: of the transformer;
    text_dtype: of the text encoders; the autoencoder is float32. Raises ValueError if the folder cannot be loaded.
    """
    import diffusers

    silence_libraries()
    index = read_index(path)
    if index["_class_name"] not in KNOWN_PIPELINES:
        raise ValueError(f"{path} holds a {index['_class_name']}: {', '.join(KNOWN_PIPELINES)} are supported")
    # Parts whose own classes need torchvision are set afterwards, for the library asks for its own classes.
    processors: dict[str, Callable[[Path], object]] = {}
    if "processor" in index:
        processors["processor"] = VisionProcessor.from_pretrained
    if index.get("tokenizer", [None, None])[1] == "PixtralProcessor":
        processors["tokenizer"] = chat_tokenizer
    absent: dict[str, None] = dict.fromkeys([*absent_parts(path, index), *processors])
    if not encoders:
        absent |= {k: None for k in TEXT_ENCODERS if k in index}
    dtypes = {"transformer": dtype, "default": torch.float32} | {k: text_dtype for k in TEXT_ENCODERS if k in index}
    try:
        parts = load_parts(path, index, dtypes, skip=absent)
        pipe = getattr(diffusers, index["_class_name"]).from_pretrained(
            path, local_files_only=True, use_safetensors=True, dtype=dtypes, **parts, **absent
        )
        for name, maker in processors.items():
            setattr(pipe, name, maker(path / name))
    except UnfitWeights:
        raise
    except Exception as e:  # whatever a broken folder makes the library raise
        raise ValueError(f"{path} cannot be loaded as a pipeline: {e}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def absent_parts(path: Path, index: Json) -> list[str]:
    """Parts that a pipeline must be given as None when it is loaded.

    SD3 has no third encoder where the index says so of the encoder or of its tokenizer, or where either was deleted.
    """
    third = [k for k in ("text_encoder_3", "tokenizer_3") if k in index]
    return third if any(index[k][0] is None or not (path / k).is_dir() for k in third) else []


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model's folder: of several types those in the plain one, without what an operating system left."""
    files = sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith("."))
    plain = [f for f in files if not any(f.match(v) for v in hub.DTYPE_VARIANTS)]
    return plain or files


class UnfitWeights(ValueError):
    """Weights that are not those of their class."""


def load_parts(path: Path, index: Json, dtypes: Mapping[str, torch.dtype], skip: Collection[str] = ()) -> dict[str, nn.Module]:
    """The models of a pipeline's folder, each with exactly the weights that its class needs, by their names in `index`.

    dtypes: by name, and under "default". Files that have a bf16 or fp16 variant alone are read.

    Raises UnfitWeights that names keys which are missing, left over or of another shape.
    """
    names = [k for k, kind in index.items() if isinstance(kind, list) and kind[0] in ("diffusers", "transformers")]
    names = [k for k in names if k not in skip]
    for k in names:
        if not weight_files(path / k) and (pickled := [*(path / k).glob("*.bin"), *(path / k).glob("*.pt")]):
            raise UnfitWeights(
                f"{pickled[0]} is a pickle, which could run code: load the pipeline where you trust it, call "
                "save_pretrained(..., safe_serialization=True), and name that folder"
            )
    names = [k for k in names if weight_files(path / k)]
    return {k: _load_part(path / k, index[k], dtypes.get(k, dtypes["default"])) for k in names}


def _load_part(folder: Path, kind: Sequence[str], dtype: torch.dtype) -> nn.Module:
    files = [f.name for f in weight_files(folder)]
    variant = next((v for v in ("bf16", "fp16") if all(f".{v}" in name for name in files)), None)
    cls = getattr(importlib.import_module(kind[0]), kind[1])
    key = "torch_dtype" if kind[0] == "diffusers" else "dtype"
    model, info = cls.from_pretrained(
        folder, **{key: dtype}, variant=variant, output_loading_info=True, local_files_only=True, use_safetensors=True
    )
    wrong = {k: sorted(map(str, info.get(k) or ())) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        found = "; ".join(f"{len(v)} {k.replace('_', ' ')}, such as {v[0]}" for k, v in wrong.items() if v)
        hint = "the folder is damaged or was saved by another program: fetch or convert the model again"
        if any("lora" in k or "base_layer" in k for v in wrong.values() for k in v):
            hint = "a LoRA was not unloaded before saving: call fuse_lora() and unload_lora_weights(), then save_pretrained()"
        raise UnfitWeights(f"{folder} does not hold the weights of {kind[1]} ({found}): {hint}")
    return model.eval()


def save_pipeline(pipe: Pipeline, path: Path, metadata: Json) -> None:
    """Write a diffusers folder with its metadata, without the names of the folders that its parts were read from."""
    pipe.save_pretrained(path)
    for file in path.rglob("*.json"):
        config = json.loads(file.read_text())
        if "_name_or_path" in config:
            del config["_name_or_path"]
            file.write_text(json.dumps(config, indent=2) + "\n")
    (path / METADATA_FILE).write_text(json.dumps(metadata | {HASH_KEY: _weights_hash(path)}, indent=1))


def default_sampling(path: Path) -> SamplerConfig:
    """How a folder's metadata say that it is sampled; without them as its model card does, on its scheduler's grid.

    Raises ValueError if they are bad.
    """
    try:
        if sampling := read_metadata(path).get("sampling"):
            return SamplerConfig.from_json(sampling)
    except ValueError as e:
        raise ValueError(f"{path / METADATA_FILE}: {e}") from None
    index, config = read_index(path), read_object(path / "transformer" / "config.json", hint=EXPORT_AGAIN)
    card = card_sampling(index["_class_name"], config, bool(index.get("is_distilled")))
    return SamplerConfig(steps=card.steps, shift=None, guidance_scale=card.cfg)


def backbone_from_pipeline(pipe: Pipeline, metadata: Json) -> Backbone:
    """The backbone of a pipeline; its metadata may hold `t5_length` (SD3), the latents' `side`, a `null_prompt` (Qwen),
    a `source_side` (Qwen-Image-Edit), `embedded_guidance` (FLUX.1 and FLUX.2 dev) and `text_length` (FLUX)."""
    kind = type(pipe).__name__
    if kind in ("QwenImagePipeline", *EDIT_PIPELINES):
        more = {k: v for k, v in metadata.items() if k in ("null_prompt", *("source_side",) * (kind in EDIT_PIPELINES))}
        cls = QwenImageEdit if kind in EDIT_PIPELINES else QwenImage
        return cls(pipe, side=metadata.get("side", pipe.default_sample_size), **more)
    if kind in ("FluxPipeline", "Flux2Pipeline"):
        names = {"side": "side", "embedded_guidance": "guidance", "text_length": "text_length"}
        return (Flux if kind == "FluxPipeline" else Flux2Dev)(pipe, **{names[k]: v for k, v in metadata.items() if k in names})
    if kind == "Flux2KleinPipeline":
        return Flux2(pipe, **{k: v for k, v in metadata.items() if k in ("side", "text_length")})
    if kind == "ZImagePipeline":
        return ZImage(pipe, side=metadata.get("side", 128))
    return SD3(pipe, t5_length=metadata.get("t5_length", 256), side=metadata.get("side"))


def load(
    name: str,
    encoders: bool = True,
    dtype: torch.dtype = torch.float32,
    text_dtype: torch.dtype = torch.float32,
    resolution: int | None = None,
) -> tuple[Backbone, SamplerConfig]:
    """A backbone and how it is sampled, on the CPU, at another side in pixels if `resolution` is given.

    The rest as in `load_pipeline`.

    Raises ValueError if the autoencoder or the transformer cannot do that side, or if the transformer's files are not those
    that the metadata were written for.
    """
    path = pipeline_folder(name)
    verify_weights(path)
    pipe, metadata = load_pipeline(path, encoders, dtype, text_dtype), read_metadata(path)
    if resolution is not None:
        scale = pipe.vae_scale_factor
        if resolution < 1 or resolution % scale:
            raise ValueError(f"resolution={resolution}: a multiple of {scale}, of which this autoencoder makes one latent")
        metadata = metadata | {"side": resolution // scale}
    backbone = backbone_from_pipeline(pipe, metadata)
    if (path / TARGET_TIME).is_file():
        attach_zero_target(backbone.net, read_tensors(path / TARGET_TIME, hint=EXPORT_AGAIN), backbone.time_embedding)
    backbone.net.requires_grad_(False).eval()
    return backbone, default_sampling(path)


def load_for_sampling(name: str, device: str = "auto", dtype: str = "auto") -> tuple[Backbone, SamplerConfig]:
    """A backbone with all its parts on a device, and how it is sampled.

    device: one of DEVICES. dtype: of transformer and text encoders, one of DTYPES; auto is float32 on the CPU, the type of the
    transformer's file on a GPU that has it. The autoencoder is float32.

    Raises ValueError as `load`, if there is no such device, or on another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: one of {', '.join(DTYPES)}")
    device = resolve_device(device)
    if dtype == "auto":
        kind = torch.float32 if device == "cpu" else stored_dtype(pipeline_folder(name))
        kind = kind if has_dtype(device, kind) else torch.float32
    else:
        kind = getattr(torch, dtype)
        check_dtype(device, dtype)
    backbone, sampler = load(name, dtype=kind, text_dtype=kind)
    for module in (*backbone.encoders, backbone.net, backbone.vae):
        module.to(device)
    return backbone, sampler
