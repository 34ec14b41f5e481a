"""LoRA files as people have them: keys of diffusers, peft, kohya and ComfyUI, read as products on a network's linear layers."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advdmd.files import read_object, read_tensors
from advdmd.models import hub
from advdmd.models.lora import SEP, LoraModel
from advdmd.types import Json

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name, and ours
FILE_NAMES = (LORA_FILE, "adapter_model.safetensors")
KEY = re.compile(r"(.+?)\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|alpha)(?:\.[\w-]+)?(?:\.weight)?")
PREFIXES = ("base_model.model.", "model.", "diffusion_model.", "transformer.", "lora_unet_", "lora_transformer_", "lycoris_")
OTHER_KINDS = {"dora_scale": "DoRA", "lora_magnitude": "DoRA", "lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT"}
FUSE = (
    "apply it in diffusers with load_lora_weights and fuse_lora, call unload_lora_weights and save_pretrained, and name that "
    "folder as the teacher"
)


@dataclass(frozen=True)
class LoraFile:
    """products: layer name -> A [rank, in], B [out, rank], float32, alpha and scale included. record: advdmd.json of our
    exports."""

    name: str
    products: Mapping[str, tuple[Tensor, Tensor]]
    record: Json

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(a.shape[0] for a, _ in self.products.values())


def parse_lora(text: str) -> tuple[str, float]:
    """FILE_OR_HUB_ID[:SCALE] -> the two; the scale is 1 by default. Raises ValueError on a scale that is no number or 0."""
    source, colon, scale = text.rpartition(":")
    if not colon or "/" in scale or "\\" in scale or scale.endswith(".safetensors"):
        return text, 1.0
    try:
        value = float(scale)
    except ValueError:
        value = float("nan")
    if not (source and 0 < abs(value) < float("inf")):
        raise ValueError(f"{text!r}: write FILE_OR_HUB_ID or FILE_OR_HUB_ID:SCALE with a scale other than 0")
    return source, value


def lora_file(text: str) -> Path:
    """The safetensors of a LoRA, FILE_OR_HUB_ID[:SCALE]: a file, the one in a folder, or that of OWNER/NAME on the hub.

    Raises ValueError if there is none.
    """
    source, _ = parse_lora(text)
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{source} is no safetensors file; pickles, which could run code, are not read")
        return path
    if not path.exists():
        path = hub.download(source)
    named = [path / name for name in FILE_NAMES if (path / name).is_file()]
    found = named or [f for f in sorted(path.glob("*.safetensors")) if not f.name.startswith(".")]
    if len(found) != 1:
        names = ", ".join(f.name for f in found) or "none"
        raise ValueError(f"{source} holds {len(found)} safetensors that may be its LoRA ({names}): name the file")
    return found[0]


def read_lora(text: str, net: nn.Module) -> LoraFile:
    """A LoRA for a network, FILE_OR_HUB_ID[:SCALE], from `lora_file`.

    Every key of the file is used, or a ValueError names the first that cannot be: one of a text encoder, of a layer that the
    network lacks or of another shape, and kinds other than plain LoRA.
    """
    source, strength = parse_lora(text)
    path = lora_file(text)
    tensors, header = read_tensors(path, hint="fetch the file again"), _header(path)
    for key in tensors:
        if kind := next((kind for part, kind in OTHER_KINDS.items() if part in key), None):
            raise ValueError(f"{source} is a {kind} ({key}), not a plain LoRA: {FUSE}")
        if key.startswith(("lora_te", "text_encoder")):
            raise ValueError(f"{source} also changes a text encoder ({key}), which stays as it is in training: {FUSE}")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if not (found := KEY.fullmatch(key)):
            raise ValueError(f"{source}: {key} is no part of a LoRA")
        kind = {"lora_down": "lora_A", "lora.down": "lora_A", "lora_up": "lora_B", "lora.up": "lora_B"}.get(found[2], found[2])
        parts.setdefault(found[1], {})[kind] = value.float()
    scale_of, layers, products = _scales(path, header), _layers(net), {}
    for module, part in parts.items():
        if not {"lora_A", "lora_B"} <= set(part):
            raise ValueError(f"{source}: {module} has only {', '.join(sorted(part))}: the file is damaged")
        a, b = (_matrix(source, module, part[k]) for k in ("lora_A", "lora_B"))
        scale = part["alpha"].item() / a.shape[0] if "alpha" in part else scale_of(module, a.shape[0])
        for name, piece in _placed(source, module, layers, strength * scale * b, net):
            weight = net.get_submodule(name).get_parameter("weight")
            if (piece.shape[0], a.shape[1]) != tuple(weight.shape) or piece.shape[1] != a.shape[0]:
                raise ValueError(
                    f"{source}: {module} is [{piece.shape[0]}, {a.shape[1]}], the model's {name} {list(weight.shape)}: it "
                    "was made for another model"
                )
            products[name] = (a, piece)
    if not products:
        raise ValueError(f"{source} holds no LoRA")
    return LoraFile(source, products, json.loads(header.get("advdmd", "{}")))


def plain_network(net: nn.Module) -> nn.Module:
    """A diffusers model of the same configuration without memory for its weights: where a LoRA's layers are looked up."""
    model: Any = net
    with torch.device("meta"):
        return type(model).from_config(model.config)


@torch.no_grad()
def fuse(net: nn.Module, lora: LoraFile) -> None:
    """Add a LoRA's products to a network's weights [out, in], in place, summed in float32."""
    for name, (a, b) in lora.products.items():
        weight = net.get_submodule(name).get_parameter("weight")
        weight.copy_(weight.float() + (b @ a).to(weight.device))


@torch.no_grad()
def load_adapter(adapter: LoraModel, lora: LoraFile) -> None:
    """Start an adapter from a LoRA of its layers, with zeros where its own rank is larger. Raises ValueError if it is less."""
    own = dict(adapter.named_parameters())
    places = {k.rpartition(f"{SEP}lora_")[0].replace(SEP, "."): k.rpartition(f"{SEP}lora_")[0] for k in own}
    if lost := sorted(set(lora.products) - set(places)):
        raise ValueError(f"{lora.name} reaches {lost[0]}, which adapters here do not: set lora_rank=0")
    for name, (a, b) in lora.products.items():
        to_a, to_b = (own[f"{places[name]}{SEP}lora_{kind}"] for kind in "AB")
        if a.shape[0] > to_a.shape[0]:
            raise ValueError(f"{lora.name} has rank {lora.rank}: set lora_rank={lora.rank} or more")
        to_a[: a.shape[0]].copy_(a)  # what is beyond stays as it was made: with a B of 0 it adds nothing, and learns
        to_b.zero_()
        to_b[:, : b.shape[1]].copy_(b)


def joined(first: LoraFile, second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One LoRA that does what two do: products of the first beside the second, in diffusers' keys.

    Every layer has the same rank, filled with zeros: without alphas diffusers takes one alpha for all layers.
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for key, a in second.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            pairs[name] = (a.cpu().float(), second[key.replace("lora_A", "lora_B")].cpu().float())
    out: dict[str, Tensor] = {}
    rank = first.rank + max(a.shape[0] for a, _ in pairs.values())
    for name in sorted({*first.products, *pairs}):
        both = [p for p in (first.products.get(name), pairs.get(name)) if p is not None]
        a, b = torch.cat([a for a, _ in both]), torch.cat([b for _, b in both], 1)
        out[f"transformer.{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, rank - a.shape[0]))
        out[f"transformer.{name}.lora_B.weight"] = nn.functional.pad(b, (0, rank - b.shape[1]))
    return out


def _header(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def _scales(path: Path, header: Mapping[str, str]) -> Callable[[str, int], float]:
    """(module, rank) -> alpha / rank of modules without an alpha of their own, by peft's configuration if there is one."""
    config: Json = {}
    if (beside := path.parent / "adapter_config.json").is_file():
        config = read_object(beside, hint="fetch the LoRA again")
    elif "lora_adapter_metadata" in header:
        config = {k.removeprefix("transformer."): v for k, v in json.loads(header["lora_adapter_metadata"]).items()}
    if config.get("use_dora"):
        raise ValueError(f"{path} is a DoRA, not a plain LoRA: {FUSE}")

    def scale(module: str, rank: int) -> float:
        if "lora_alpha" not in config:
            return 1.0
        patterns = (config.get("alpha_pattern") or {}).items()
        alpha = next((v for k, v in patterns if re.match(rf"(.*\.)?({k})$", module)), config["lora_alpha"])
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)

    return scale


def _matrix(source: str, module: str, x: Tensor) -> Tensor:
    if x.ndim == 4 and x.shape[2:] == (1, 1):  # kohya writes linear layers so at times
        x = x[:, :, 0, 0]
    if x.ndim != 2:
        raise ValueError(f"{source}: {module} is a convolution's, of shape {list(x.shape)}: {FUSE}")
    return x


def _placed(
    source: str, module: str, layers: Mapping[str, tuple[str, ...]], b: Tensor, net: nn.Module
) -> Iterator[tuple[str, Tensor]]:
    """The layers of the network that a module's B [out, rank] is for, each with its rows."""
    name = module
    while name not in layers and _flat(name) not in layers:
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is None:
            raise ValueError(f"{source}: the model has no layer {module}: the LoRA was made for another model")
        name = name.removeprefix(prefix)
    targets = layers.get(name) or layers[_flat(name)]
    rows = [net.get_submodule(t.removesuffix(SWAPPED)).get_parameter("weight").shape[0] for t in targets]
    if sum(rows) != b.shape[0] and len(targets) > 1:
        raise ValueError(f"{source}: {module} has {b.shape[0]} rows, its {len(targets)} layers {sum(rows)}: of another model")
    for target, piece in zip(targets, b.split(rows) if len(targets) > 1 else [b], strict=True):
        yield target.removesuffix(SWAPPED), torch.cat(piece.chunk(2)[::-1]) if target.endswith(SWAPPED) else piece


def _flat(name: str) -> str:
    return name.replace(".", "_")


SWAPPED = "|swapped"  # behind a layer's name: the two halves of its rows are in the other order
QKV = ("to_q", "to_k", "to_v")
# Modules of Stability's own SD3, by their names there -> names in diffusers; kohya's and ComfyUI's files have them.
SD3_MODULES = {
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": (f"norm_out.linear{SWAPPED}",),
}
SD3_BLOCK_MODULES = {
    "x_block.attn.qkv": tuple(f"attn.{k}" for k in QKV),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": tuple(f"attn2.{k}" for k in QKV),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}


def _flux_modules(embedding: str) -> dict[str, tuple[str, ...]]:
    """The same of Black Forest Labs' own FLUX outside its blocks; embedding: diffusers' name for that of the times."""
    parts = (("time_in", "timestep_embedder"), ("vector_in", "text_embedder"), ("guidance_in", "guidance_embedder"))
    return {
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": (f"norm_out.linear{SWAPPED}",),
        **{
            f"{theirs}.{layer}": (f"{embedding}.{ours}.linear_{i}",)
            for theirs, ours in parts
            for i, layer in ((1, "in_layer"), (2, "out_layer"))
        },
    }


FLUX_BLOCK_MODULES = {
    "double_blocks": {
        "img_attn.qkv": tuple(f"attn.{k}" for k in QKV),
        "img_attn.proj": ("attn.to_out.0",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "img_mod.lin": ("norm1.linear",),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "txt_attn.proj": ("attn.to_add_out",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
        "txt_mod.lin": ("norm1_context.linear",),
    },
    "single_blocks": {
        "linear1": (*(f"attn.{k}" for k in QKV), "proj_mlp"),
        "linear2": ("proj_out",),
        "modulation.lin": ("norm.linear",),
    },
}
FLUX2_MODULES = {
    f"{name}.lin": (f"{name}.linear",)
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
}
FLUX2_BLOCK_MODULES = {
    "double_blocks": {
        "img_attn.qkv": tuple(f"attn.{k}" for k in QKV),
        "img_attn.proj": ("attn.to_out.0",),
        "img_mlp.0": ("ff.linear_in",),
        "img_mlp.2": ("ff.linear_out",),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "txt_attn.proj": ("attn.to_add_out",),
        "txt_mlp.0": ("ff_context.linear_in",),
        "txt_mlp.2": ("ff_context.linear_out",),
    },
    "single_blocks": {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
}
Z_IMAGE_BLOCK_MODULES = {
    "attention.qkv": tuple(f"attention.{k}" for k in QKV),
    "attention.out": ("attention.to_out.0",),
}


def _layers(net: nn.Module) -> dict[str, tuple[str, ...]]:
    """Names that a LoRA may give to a network's linear layers, with dots and with underscores -> the layers."""
    own = [k for k, m in net.named_modules() if isinstance(m, nn.Linear)]
    out: dict[str, tuple[str, ...]] = {k: (k,) for k in own}
    kind = type(net).__name__
    if kind == "SD3Transformer2DModel":
        blocks: list[nn.Module] = list(net.get_submodule("transformer_blocks").children())
        out |= SD3_MODULES
        for i, block in enumerate(blocks):
            for name, targets in SD3_BLOCK_MODULES.items():
                last = getattr(block, "context_pre_only", False) and name == "context_block.adaLN_modulation.1"
                out[f"joint_blocks.{i}.{name}"] = tuple(f"transformer_blocks.{i}.{t}{SWAPPED * last}" for t in targets)
    elif kind in ("FluxTransformer2DModel", "Flux2Transformer2DModel"):
        first = kind == "FluxTransformer2DModel"
        out |= _flux_modules("time_text_embed") if first else _flux_modules("time_guidance_embed") | FLUX2_MODULES
        modules = FLUX_BLOCK_MODULES if first else FLUX2_BLOCK_MODULES
        for theirs, ours in (("double_blocks", "transformer_blocks"), ("single_blocks", "single_transformer_blocks")):
            for i in range(len(list(net.get_submodule(ours).children()))):
                for name, targets in modules[theirs].items():
                    out[f"{theirs}.{i}.{name}"] = tuple(f"{ours}.{i}.{t}" for t in targets)
    elif kind == "ZImageTransformer2DModel":
        for group in ("layers", "noise_refiner", "context_refiner"):
            for i in range(len(list(net.get_submodule(group).children()))):
                out |= {
                    f"{group}.{i}.{name}": tuple(f"{group}.{i}.{t}" for t in targets)
                    for name, targets in Z_IMAGE_BLOCK_MODULES.items()
                }
    present = set(own)
    out = {k: v for k, v in out.items() if all(t.removesuffix(SWAPPED) in present for t in v)}
    return out | {_flat(k): v for k, v in out.items()}
