"""What a recipe takes of a card, by part, from the transformer's configuration alone: nothing is loaded."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from advdmd.algorithms.advdmd import AdvDMD
from advdmd.algorithms.twinflow import TwinFlow
from advdmd.files import read_object
from advdmd.models import loading, quantization
from advdmd.models.backbone import ATTENTION
from advdmd.recipes.published import MODELS
from advdmd.recipes.recipe import Recipe

GB = 1e9
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
BLOCK_WIDTHS = (
    34  # widths a block holds for its own backward, per token: queries, keys, values, the wide layer and what lies between
)
COUNTED_CLASSES = ("SD3Transformer2DModel", "QwenImageTransformer2DModel")
DEFAULT_TEXT_TOKENS = 77  # tokens of a prompt where nobody says


@dataclass(frozen=True)
class MemoryEstimate:
    """Parameters, and bytes of a card by part; `activations` is an estimate, the rest is counted."""

    base: int
    adapter: int  # of one role; 0 for whole networks
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@functools.cache
def transformer(teacher: str) -> tuple[Any, int]:
    """A teacher's transformer without memory behind it, and how many tokens of text it sees.

    Raises ValueError if the teacher is neither published nor a pipeline folder, or has a transformer of another class.
    """
    loading.silence_libraries()
    import diffusers

    published = {m.hub: m for m in MODELS.values()}
    if teacher in published:
        model = published[teacher]
        name, config, text = model.transformer, model.config, model.text
    else:
        folder = loading.pipeline_folder(teacher, loading.DESCRIPTION_FILES)
        config = read_object(folder / "transformer/config.json", "_class_name", way_out="download the teacher again")
        name, note = config["_class_name"], loading.read_metadata(folder)
        text = {m.transformer: m.text for m in MODELS.values()}.get(name, DEFAULT_TEXT_TOKENS)
        text = DEFAULT_TEXT_TOKENS + note["t5_length"] if "t5_length" in note else text
    if name not in COUNTED_CLASSES:
        raise ValueError(f"{teacher} has a {name}: memory is counted for {' and '.join(COUNTED_CLASSES)} only")
    cls = getattr(diffusers, name)
    with torch.device("meta"):
        return cls.from_config(config) if "_class_name" in config else cls(**config), text


def num_trainable(r: Recipe) -> int:
    """Trainable networks of a recipe, or adapters on one."""
    return 1 if isinstance(r.algorithm, TwinFlow) else 2 + (r.critic.trunk == "own")


def estimate(r: Recipe, resolution: int = 1024, cards: int = 1) -> MemoryEstimate:
    """Bytes of a card that a recipe takes at a resolution in pixels, when it runs on so many of them. Text encoders and
    autoencoder are not on it: text is encoded before, and pictures to look at are decoded on the CPU."""
    net, text = transformer(r.teacher)
    base = sum(p.numel() for p in net.parameters())
    # Every target of SD3 and Qwen-Image is a linear layer of a block, in attention or behind it.
    layers = [m for k, m in net.named_modules() if isinstance(m, torch.nn.Linear) and _is_adapted(k)]
    adapter = r.lora_rank * sum(m.in_features + m.out_features for m in layers)
    learned, n, bytes_each = adapter or base, num_trainable(r), DTYPE_BYTES[r.base_dtype(cards)]
    linear = [m for k, m in net.named_modules() if isinstance(m, torch.nn.Linear) and "transformer_blocks." in k]
    few = sum(m.weight.numel() for m in linear) if r.base_bits < 32 else 0
    moments = [r.fake] * (n - 1) + [r.match] + [r.policy] * isinstance(r.algorithm, AdvDMD)  # two of each, for each optimizer
    parts = {
        "frozen base": float((base - few) * bytes_each + few * quantization.BYTES_PER_WEIGHT.get(r.base_bits, 0)),
        "trained weights": 4.0 * learned * n,
        "gradients": 4.0 * learned * max(1, n - 1),  # fake score and trunk learn together, the student after them
        "Adam": learned * sum(o.bits / 4 for o in moments),
        "average": 4.0 * learned,
    }
    spread = r.spread_over(cards)
    if spread:  # every card holds its share, and what the pass is at: the block that is used and the next
        parts = {k: v / cards for k, v in parts.items()}
        parts["gathered"] = 2.0 * base / net.config.num_layers * bytes_each
    width = net.inner_dim
    patch = net.config.patch_size if "patch_size" in net.config else 2
    tokens = (resolution // 8 // patch) ** 2 + text
    mine = max(1, r.batch // cards)
    samples = 2 * min(getattr(r.algorithm, "micro", mine), mine)  # guidance, or real beside generated, as one double batch
    inside = 1 if r.checkpointing else BLOCK_WIDTHS
    held = net.config.num_layers * inside + BLOCK_WIDTHS
    parts["activations"] = float(samples * tokens * width * bytes_each * held)
    if adapter and r.base_bits == 32 and r.base_dtype(cards) == "float32" and not r.checkpointing:
        # Merged weights (models/lora.py) of the networks of one graph: the student, and a trunk that follows it.
        parts["activations"] += 4.0 * min(n, 2) * sum(m.weight.numel() for m in layers)
    path = (2 * r.algorithm.steps + 3) * 16 * (resolution // 8) ** 2
    said = text * net.config.joint_attention_dim * (2 if getattr(r.algorithm, "mismatch", 0) else 1)
    parts["paths and text"] = 4.0 * r.batch / cards * (path + said)
    if spread:  # while pictures are drawn the first card holds the student whole, instead of what a pass takes
        standing = sum(parts[k] for k in ("frozen base", "trained weights", "Adam", "average"))
        parts["more while pictures are drawn"] = max(0.0, standing + float(base) * bytes_each - sum(parts.values()))
    return MemoryEstimate(base, adapter, parts)


def _is_adapted(name: str) -> bool:
    return "transformer_blocks." in name and (name.endswith(ATTENTION) or (".net." in name))


def fit_advice(r: Recipe, found: MemoryEstimate, card: float) -> str:
    """Whether a card of so many GB will do, and if not what to change."""
    free = card * 0.94 - found.total / GB  # what the driver and fragments leave
    if free >= 0:
        return f"fits a {card:g} GB card with {free:.0f} GB to spare"
    ways = []
    if not r.lora_rank:
        ways += ["lora_rank=32 shard=false (adapters on one base)"] + ["more cards"] * r.shard
    if not r.checkpointing:
        ways.append("checkpointing=true")
    if getattr(r.algorithm, "micro", 1) > 1:
        ways.append("algorithm.micro=1")
    if found.parts["activations"] > 0.2 * found.total:
        ways.append("a smaller resolution when encoding")
    if r.lora_rank > 16:
        ways.append("lora_rank=16")
    if r.lora_rank and r.base_bits > 4:
        ways.append("base_bits=4 (advdmd's extra `bits`)")
    least = found.parts["frozen base"] / GB  # of which a sharded run needs its share only
    if r.lora_rank:
        least = min(least, found.base * quantization.BYTES_PER_WEIGHT[4] / GB)
    if least > card * 0.94:
        ways = [f"the frozen base alone takes {least:.0f} GB: only a larger card or a smaller model will do"]
    return f"needs {found.total / GB:.0f} GB, too much for a {card:g} GB card: " + ", ".join(ways or ["a larger card"])
