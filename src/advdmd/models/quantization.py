"""A frozen base in few bits: linear layers of the blocks as 8-bit integers (2208.07339) or 4-bit NormalFloat (2305.14314).

The arithmetic is bitsandbytes' (the extra `bits`). Adapters on such layers stay float32, and gradients flow through the layers.
"""

import logging
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

# Bytes of a weight: 4 bits and a scale of 8 bits for each 64 of them; 8 bits and a scale per row, which counts for nothing.
BYTES_PER_WEIGHT = {4: 0.5 + 1 / 64, 8: 1.0}


def import_bitsandbytes() -> Any:
    """The module bitsandbytes. Raises ValueError that says how to install it."""
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError("8-bit optimizers and a base of 8 or 4 bits need bitsandbytes: pip install 'advdmd[bits]'") from None
    # Otherwise it logs, for each of them, that 8-bit products are made of halves.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return bitsandbytes


def quantize(blocks: Iterable[nn.Module], bits: int, dtype: torch.dtype, device: str) -> None:
    """Replace every linear layer of the blocks by one of 4 or 8 bits on `device`, in place; it computes in `dtype`."""
    bnb = import_bitsandbytes()
    for block in blocks:
        for name, layer in [*block.named_modules()]:
            if type(layer) is not nn.Linear:
                continue
            size, bias, stored = (layer.in_features, layer.out_features), layer.bias is not None, layer.weight.data
            with torch.device("meta"):  # the new layer's own weights are not wanted
                if bits == 4:
                    small = bnb.nn.Linear4bit(*size, bias=bias, compute_dtype=dtype, quant_type="nf4")
                    small.weight = bnb.nn.Params4bit(stored, requires_grad=False, quant_type="nf4", module=small)
                    small.support_avx512bf16_for_cpu = False  # a layout of bitsandbytes that has no gradient
                else:
                    small = bnb.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False, threshold=6.0)
                    small.weight = bnb.nn.Int8Params(stored, requires_grad=False, has_fp16_weights=False)
            small.bias, small.was = layer.bias, stored.dtype
            small.train(layer.training)
            parent, _, last = name.rpartition(".")
            setattr(block.get_submodule(parent), last, small.to(device).requires_grad_(False))


def dequantize(layer: nn.Module) -> Tensor | None:
    """The weight [out, in] of a layer of few bits, in the type that it was made from; None for any other layer."""
    kind, small = type(layer).__name__, cast(Any, layer)  # by name: other layers do not need the library
    if kind == "Linear4bit":
        return import_bitsandbytes().functional.dequantize_4bit(small.weight.data, small.weight.quant_state).to(small.was)
    if kind == "Linear8bitLt":
        return (
            import_bitsandbytes().functional.int8_vectorwise_dequant(small.weight.data, small.state_dict()["SCB"]).to(small.was)
        )
    return None
