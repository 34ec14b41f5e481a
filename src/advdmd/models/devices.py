"""Where networks run, and which numbers a device has."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")  # what a user may ask for when images are generated


def resolve_device(device: str) -> str:
    """The device to use for `device`, one of DEVICES: auto is cuda or cpu. Raises ValueError if a GPU is not there."""
    if device not in DEVICES:
        raise ValueError(f"device={device}: one of {', '.join(DEVICES)}")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device, True):
        raise ValueError(f"device={device}: torch sees no such GPU here; use device=cpu or auto")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def has_dtype(device: str, dtype: torch.dtype) -> bool:
    """Whether a device has numbers of a type: older Apple GPUs have no bfloat16."""
    try:
        torch.zeros(1, dtype=dtype, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def check_dtype(device: str, dtype: str) -> None:
    """Raises ValueError if a device has no numbers of a type."""
    if not has_dtype(device, getattr(torch, dtype)):
        raise ValueError(f"dtype={dtype}: device={device} has no such numbers here; use dtype=float32")


@contextmanager
def float32_precision(dtype: str) -> Iterator[None]:
    """Inside, a GPU computes in float32 as a run needs it whose networks pass in `dtype`.

    Convolutions are as exact as the CPU's, which cuDNN would round to TF32. Products of matrices are exact where networks pass
    in float32. Where they pass in bfloat16, products are rounded to TF32, which has more bits.
    """
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest" if dtype == "float32" else "high")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
