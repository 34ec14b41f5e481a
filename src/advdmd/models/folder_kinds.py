"""What a folder or file is that was named as a pipeline and is none."""

from collections.abc import Sequence
from pathlib import Path


def no_pipeline(name: str, path: Path, shipped: Sequence[str]) -> str:
    """What the path of a model is instead of a pipeline, and the way to one. shipped: names of models that are installed."""
    convert = "load it in diffusers with from_single_file({!r}), call save_pretrained, and name that folder"
    if path.suffix == ".gguf":
        return f"{name} is a GGUF file, whose rounded weights cannot be trained: name the pipeline that it was made from"
    if path.is_file() and path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        return f"{name} is a single file, not a pipeline folder: {convert.format(path.name)}"
    if (path / "recipe.yaml").is_file():
        return f"{name} is the folder of a training run: its student is {path / 'student'}"
    if list(path.glob("*lora*.safetensors")) or (path / "adapter_config.json").is_file():
        return (
            f"{name} holds a LoRA, not a pipeline: load its base in diffusers, call load_lora_weights, fuse_lora, "
            "unload_lora_weights and save_pretrained, and name that folder"
        )
    if singles := [f for f in sorted(path.glob("*.safetensors")) if f.name[:1] != "." and not (path / "config.json").is_file()]:
        return f"{name} holds {singles[0].name} and no model_index.json: {convert.format(singles[0].name)}"
    if (path / "config.json").is_file() or (path / "transformer").is_dir():
        return (
            f"{name} holds a part of a pipeline (no model_index.json): name the folder of the whole one, with text encoders, "
            "autoencoder and scheduler"
        )
    return (
        f"{name!r} is neither a shipped model ({', '.join(shipped)}) nor a diffusers pipeline folder (no "
        "model_index.json); advdmd pretrain makes teachers of the miniature"
    )
