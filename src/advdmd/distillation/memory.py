"""The memory of a GPU that a recipe takes, by part, from the transformer's configuration alone: nothing is loaded."""

import functools
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from advdmd.files import read_object
from advdmd.models import flux, flux2, loading, quantization, qwen_image, sd3, z_image
from advdmd.models.backbone import Module
from advdmd.models.qwen_image_edit import SOURCE_SIDE
from advdmd.recipes.published import MODELS
from advdmd.recipes.recipe import Recipe

GB = 1e9
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
BLOCK_WIDTHS = 34  # widths a block keeps for its own backward, per token: queries, keys, values, the MLP and what is between
DEFAULT_TEXT_TOKENS = 77  # of a prompt, where neither model nor metadata tell
SOURCE_TOKENS = 14 * 14  # of a source image in a prompt, since version 2509
FIRST_EDIT_TOKENS = 37 * 37 - 14 * 14  # that the first Qwen-Image-Edit has more, in units of 28 pixels: of 1024 pixels, not 384
USABLE = 0.94  # of a GPU's memory: the rest is the driver's and lost to fragmentation


class Counted(NamedTuple):
    """What must be known of a class of transformer: where adapters go, its blocks, and names in its configuration."""

    lora_targets: tuple[str, ...]
    blocks: tuple[str, ...] = ("transformer_blocks",)
    text_width: str = "joint_attention_dim"


BOTH = ("transformer_blocks", "single_transformer_blocks")
COUNTED = {
    "SD3Transformer2DModel": Counted(sd3.LORA_TARGETS),
    "QwenImageTransformer2DModel": Counted(qwen_image.LORA_TARGETS),
    "FluxTransformer2DModel": Counted(flux.LORA_TARGETS, BOTH),
    "Flux2Transformer2DModel": Counted(flux2.LORA_TARGETS, BOTH),
    "ZImageTransformer2DModel": Counted(z_image.LORA_TARGETS, ("layers",), "cap_feat_dim"),
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Numbers of parameters, and bytes of each GPU by part; "activations" is an estimate, the rest is counted."""

    base: int
    adapter: int  # of one network; 0 for whole networks
    networks: int  # that are trained
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())


class Inputs(NamedTuple):
    """A transformer without memory for its weights, and its tokens of text, at most, and of a source image."""

    net: Module
    text: int
    source: int


@functools.cache
def transformer(teacher: str) -> Inputs:
    """A teacher's transformer.

    Raises ValueError if the teacher is neither published nor a pipeline folder, or has a transformer of another class.
    """
    loading.silence_libraries()
    import diffusers

    published = {m.hub: m for m in MODELS.values()}
    if teacher in published:
        model = published[teacher]
        name, config, text = model.transformer, model.config, model.text
        source_side = SOURCE_SIDE if model.edits else 0
    else:
        folder = loading.pipeline_folder(teacher, loading.DESCRIPTION_FILES)
        config = read_object(folder / "transformer/config.json", "_class_name", hint="download the teacher again")
        name, metadata = config["_class_name"], loading.read_metadata(folder)
        edits = name in COUNTED and loading.edits_images(folder)
        source_side = metadata.get("source_side", SOURCE_SIDE) if edits else 0
        kind = (name, edits)
        text = next((m.text for m in MODELS.values() if (m.transformer, m.edits) == kind), DEFAULT_TEXT_TOKENS)
        text += FIRST_EDIT_TOKENS if edits and loading.pipeline_class(folder) == "QwenImageEditPipeline" else 0
        text = DEFAULT_TEXT_TOKENS + metadata["t5_length"] if "t5_length" in metadata else text
    if name not in COUNTED:
        raise ValueError(f"{teacher} has a {name}: memory is counted for {', '.join(COUNTED)} only")
    cls = getattr(diffusers, name)
    with torch.device("meta"):
        net = cls.from_config(config) if "_class_name" in config else cls(**config)
    return Inputs(net, text, (source_side // 16) ** 2)


def estimate(r: Recipe, resolution: int = 1024, gpus: int = 1, nodes: int = 1, source_images: int = 1) -> MemoryEstimate:
    """Bytes of each of `gpus` GPUs on `nodes` machines that training a recipe takes, at a resolution in pixels.

    source_images: of a prompt, at most; of no effect on models that edit none.

    Text encoders and autoencoder are not on a GPU: text is encoded before, and sample grids are decoded on the CPU. Raises
    ValueError if the transformer is of a class whose memory is not known.
    """
    net, text, source = transformer(r.teacher)
    if source:
        text, source = text + SOURCE_TOKENS * (source_images - 1), source * source_images
    algorithm, base, counted = r.algorithm, sum(p.numel() for p in net.parameters()), COUNTED[type(net).__name__]
    linear = {f".{k}": m for k, m in net.named_modules() if isinstance(m, nn.Linear)}
    layers = [m for k, m in linear.items() if k.endswith(tuple(f".{t}" for t in counted.lora_targets))]
    adapter = r.lora_rank * sum(m.in_features + m.out_features for m in layers)
    trained = algorithm.trained_networks(r.discriminator.trunk == "own")
    learned, n, bytes_each = adapter or base, len(trained), DTYPE_BYTES[r.base_dtype(gpus)]
    in_blocks = [m for k, m in linear.items() if k.startswith(tuple(f".{b}." for b in counted.blocks))]
    quantized = sum(m.weight.numel() for m in in_blocks) if r.base_bits < 32 else 0
    num_blocks = sum(len(list(net.get_submodule(b).children())) for b in counted.blocks)
    optimizers = [r.optimizers[name] for name in chain(*trained.values())]  # each keeps two moments
    at_once = max(sum(name in names for names in trained.values()) for name in r.optimizers)  # networks of one update
    parts = {
        "frozen base": float((base - quantized) * bytes_each + quantized * quantization.BYTES_PER_WEIGHT.get(r.base_bits, 0)),
        "trained weights": 4.0 * learned * n,
        "gradients": 4.0 * learned * at_once,
        "Adam": learned * sum(o.state_bits / 4 for o in optimizers),
        "EMA": 4.0 * learned,
    }
    sharded = r.uses_fsdp(gpus)
    if sharded:  # every GPU holds its share, and the block that is used and the next one whole
        shares = gpus // nodes if r.fsdp_sharding == "hybrid" else gpus
        parts = {k: v / shares for k, v in parts.items()}
        parts["gathered"] = 2.0 * base / num_blocks * bytes_each
    width = getattr(net, "inner_dim", None) or net.config.dim
    tokens = tokens_of(net, resolution // 8, resolution // 8) + source + text
    samples = 2 * algorithm.samples_per_pass(max(1, r.batch // gpus))  # guidance, or real beside generated, in one pass
    per_block = 1 if r.gradient_checkpointing else BLOCK_WIDTHS
    kept = num_blocks * per_block + BLOCK_WIDTHS
    parts["activations"] = float(samples * tokens * width * bytes_each * kept)
    if adapter and r.base_bits == 32 and r.base_dtype(gpus) == "float32" and not r.gradient_checkpointing:
        # Merged weights (models/lora.py) of the networks of one graph: the student, and a trunk that follows it.
        parts["activations"] += 4.0 * min(n, 2) * sum(m.weight.numel() for m in layers)
    channels = 32 if type(net).__name__ == "Flux2Transformer2DModel" else 16
    trajectory = (2 * algorithm.steps + 3) * channels * (resolution // 8) ** 2
    words = (text * net.config[counted.text_width] + source * 4 * channels) * algorithm.conditions_per_sample
    words *= 2 if source else 1  # an edit has an empty prompt of its own
    text_bytes = r.batch / gpus * bytes_each * words
    parts["trajectories and text"] = 4.0 * r.batch / gpus * trajectory + text_bytes
    # While an iteration runs, the next one's real images, noise of the rollout and of at most five more draws, and prompts.
    parts["next batch"] = 4.0 * r.batch / gpus * (algorithm.steps + 6) * channels * (resolution // 8) ** 2 + text_bytes
    if sharded:  # while samples are generated the first GPU holds the student whole, instead of what a pass takes
        standing = sum(parts[k] for k in ("frozen base", "trained weights", "Adam", "EMA"))
        parts["more during sampling"] = max(0.0, standing + float(base) * bytes_each - sum(parts.values()))
    return MemoryEstimate(base, adapter, n, parts)


def tokens_of(net: Module, height: int, width: int, source: Tensor | None = None) -> int:
    """Tokens of an image by the size of its latents, and of the latents [N, S, C, h, w] of its source images."""
    patch = net.config.patch_size if type(net).__name__ == "SD3Transformer2DModel" else 2  # others are packed two by two
    return (height // patch) * (width // patch) + (0 if source is None else source[0, :, 0].numel() // patch**2)


def warning(r: Recipe, resolution: int, gpus: int, device: str, nodes: int = 1, source_images: int = 1) -> str:
    """What to change if this process's GPU has less memory than a recipe takes; empty if it fits or cannot be known."""
    gpu_memory = this_gpu(device)
    if gpu_memory is None:
        return ""
    try:
        need = estimate(r, resolution, gpus, nodes, source_images)
    except ValueError:  # a class of transformer whose memory is not known
        return ""
    return "" if need.total / GB <= gpu_memory * USABLE else fit_advice(r, need, round(gpu_memory))


def this_gpu(device: str) -> float | None:
    """GB of this process's GPU; None on another device."""
    if not device.startswith("cuda"):
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GB


def fit_advice(r: Recipe, found: MemoryEstimate, gpu_memory: float) -> str:
    """Whether a GPU of `gpu_memory` GB is enough, and if not what to change."""
    free = gpu_memory * USABLE - found.total / GB
    if free >= 0:
        return f"fits a {gpu_memory:g} GB GPU with {free:.0f} GB to spare"
    ways = []
    if not r.lora_rank:
        ways += ["lora_rank=32 fsdp=false (adapters on one base)"] + ["more GPUs"] * r.fsdp
    if not r.gradient_checkpointing:
        ways.append("gradient_checkpointing=true")
    if r.algorithm.samples_per_pass(r.batch) < r.batch and r.algorithm.samples_per_pass(r.batch) > 1:
        ways.append("algorithm.micro_batch_size=1")
    if found.parts["activations"] > 0.2 * found.total:
        ways.append("a smaller resolution when encoding")
    if r.lora_rank > 16:
        ways.append("lora_rank=16")
    if r.lora_rank and r.base_bits > 4:
        ways.append("base_bits=4 (advdmd's extra `bits`)")
    least = found.parts["frozen base"] / GB  # of which a sharded run needs its share only
    if r.lora_rank:
        least = min(least, found.base * quantization.BYTES_PER_WEIGHT[4] / GB)
    if least > gpu_memory * USABLE:
        ways = [f"the frozen base alone takes {least:.0f} GB: only a larger GPU or a smaller model will do"]
    usable = f"{gpu_memory * USABLE:.1f} GB of a {gpu_memory:g} GB GPU can be used"
    return f"needs {found.total / GB:.1f} GB, and {usable}: " + ", ".join(ways or ["a larger GPU"])
