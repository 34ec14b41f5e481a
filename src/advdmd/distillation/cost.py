"""Operations of a forward pass, counted from a transformer's layers, and the hours of a run by rates that were measured."""

import re
from typing import NamedTuple

from torch import nn

from advdmd.distillation import memory
from advdmd.models.backbone import Module
from advdmd.recipes.published import name_parts
from advdmd.recipes.recipe import Recipe

# What a layer is applied to, by its name: once a sample (times, guidance, modulation), text and image, or text; else the image.
ONCE = re.compile(r"norm|mod|adaLN|(^|\.)(t|text|timestep|guidance)_embedder")
BOTH = re.compile(r"^(single_transformer_blocks|layers)\.")
Z_IMAGE_MULTIPLE = 32  # tokens
TEXT = re.compile(r"context|add_|txt|cap_embedder")


def forward_operations(net: Module, image_tokens: int, text_tokens: int) -> float:
    """Floating-point operations of a forward pass of one sample: those of linear layers and of attention."""
    if type(net).__name__ == "ZImageTransformer2DModel":  # which pads each to a multiple
        image_tokens, text_tokens = (-(-n // Z_IMAGE_MULTIPLE) * Z_IMAGE_MULTIPLE for n in (image_tokens, text_tokens))
    total = 0.0
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear):
            total += 2.0 * layer.in_features * layer.out_features * _tokens(name, image_tokens, text_tokens)
        elif name.endswith((".attn", ".attn2", ".attention")):
            alone = {"noise_refiner": image_tokens, "context_refiner": text_tokens}.get(name.partition(".")[0])
            tokens = image_tokens if name.endswith(".attn2") else alone or image_tokens + text_tokens
            total += 4.0 * tokens**2 * (getattr(net, "inner_dim", None) or net.config.dim)
    return total


def _tokens(name: str, image_tokens: int, text_tokens: int) -> int:
    if ONCE.search(name):
        return 1
    if BOTH.search(name):
        return image_tokens + text_tokens
    return text_tokens if TEXT.search(name) else image_tokens


# TFLOP a second of full AdvDMD iterations, without compiled blocks, by model and side in pixels: benchmarks/card.py.
MEASURED = {
    "h100": {("sd35-medium", 512): 56.3, ("sd35-large", 512): 110.3},
    "h200": {
        **{("sd35-medium", 512): 50.3, ("sd35-medium", 1024): 176.9, ("sd35-large", 1024): 245.8},
        **{("qwen-image", 512): 203.2, ("qwen-image", 1024): 320.7},
    },
}


def hours(r: Recipe, name: str, gpu: str, resolution: int, gpus: int = 1) -> str:
    """One line: the operations of a run of a recipe called `name`, and its hours on `gpus` GPUs of a kind in MEASURED.

    At the rate that was measured for the model, or at the lowest and highest of any. Raises ValueError on another GPU, and if
    the transformer's class is not known.
    """
    if gpu.lower() not in MEASURED:
        raise ValueError(f"gpu={gpu}: rates were measured on {', '.join(MEASURED)}")
    rates, (net, text, source) = MEASURED[gpu.lower()], memory.transformer(r.teacher)
    tokens = memory.tokens_of(net, resolution // 8, resolution // 8) + source
    total = forward_operations(net, tokens, text) * r.forwards_until(r.iterations) * r.batch / 1e12
    of = name_parts(name)
    known = [rate for at, rate in rates.items() if of and at == (of.model, resolution)]
    whose = "as measured for it" if known else "as measured for other models and sizes"
    low, high = min(known or rates.values()), max(known or rates.values())
    took, at = (f"{total / rate / gpus / 3600:.1f}" for rate in (high, low)), (f"{rate:.0f}" for rate in (low, high))
    took_text, at_text = (" to ".join(dict.fromkeys(words)) for words in (took, at))  # one number where there is one rate
    many = f"{gpus} {gpu.upper()}s" if gpus > 1 else f"one {gpu.upper()}"
    return (
        f"{total / 1e6:.1f} million TFLOP: {took_text} hours on {many}, at {at_text} TFLOP/s of each, {whose} without compiled "
        "blocks"
    )


class Traffic(NamedTuple):
    """Bytes that each GPU sends in a full iteration: of gradients, and of weights that are gathered."""

    gradients: float
    weights: float


def traffic(r: Recipe, gpus: int, nodes: int = 1) -> Traffic:
    """What crosses the network between `gpus` GPUs in all, on `nodes` machines, in a full iteration of a recipe.

    Replicas sum float32 gradients in a ring. Sharded networks gather weights for each pass, at most once a counted forward, and
    scatter gradients; with fsdp_sharding=hybrid that stays inside a machine, and what crosses between machines is counted: the
    sums of a machine's shards. Raises ValueError if the transformer's class is not known.
    """
    found = memory.estimate(r, gpus=gpus)
    learned, full = found.adapter or found.base, r.full_iteration
    steps = r.algorithm.optimizer_steps(full)
    updates = sum(steps.get(name, 0) for name in r.algorithm.trained_networks(r.discriminator.trunk == "own"))
    if not r.uses_fsdp(gpus):
        return Traffic(updates * 4.0 * learned * 2 * (gpus - 1) / gpus, 0.0)
    if r.fsdp_sharding == "hybrid" and nodes > 1:
        return Traffic(updates * 4.0 * learned / (gpus // nodes) * 2 * (nodes - 1) / nodes, 0.0)
    own = max(1, r.batch // gpus)
    passes = sum(r.forwards(full).values()) * -(-own // r.algorithm.samples_per_pass(own))
    share, width = (gpus - 1) / gpus, memory.DTYPE_BYTES[r.base_dtype(gpus)]
    return Traffic(updates * 4.0 * learned * share, passes * width * found.base * share)


def traffic_line(r: Recipe, gpus: int, nodes: int, bandwidth: float) -> str:
    """`traffic` in words, with the seconds at a bandwidth in GB/s. Raises ValueError if it is not above 0."""
    if not bandwidth > 0:
        raise ValueError(f"bandwidth={bandwidth}: GB a second between GPUs, above 0")
    t = traffic(r, gpus, nodes)
    weights = f" and at most {t.weights / memory.GB:.1f} GB of weights" if t.weights else ""
    where = f"between {nodes} machines" if nodes > 1 else "between GPUs"
    return (
        f"network {where}, each GPU in a full iteration: {t.gradients / memory.GB:.2f} GB of gradients{weights}, "
        f"{(t.gradients + t.weights) / memory.GB / bandwidth:.1f} s at {bandwidth:g} GB/s"
    )
