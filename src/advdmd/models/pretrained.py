"""Weights of the models that judge: read from local folders, strictly, and hashed."""

import hashlib
from pathlib import Path

import torch

from advdmd.files import file_hash
from advdmd.models.backbone import Module, Tokenizer
from advdmd.models.loading import silence_libraries
from advdmd.types import Json


def weights_hash(folder: Path) -> str:
    """One hash over all safetensors of a folder. Raises ValueError if there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no safetensors: name a model's folder (pickled weights are never loaded)")
    return hashlib.sha256("".join(file_hash(f) for f in files).encode()).hexdigest()[:16]


def load_tensors_only(checkpoint: Path) -> Json:
    """The state dict of a .pt or .pth, whole or under "state_dict". Such a file is a pickle: only its tensors are read.

    Raises ValueError if it cannot be opened, would run code, is damaged, or holds no state dict.
    """
    try:
        found = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except OSError as e:
        raise ValueError(f"{checkpoint} cannot be opened: {e}") from None
    except Exception as e:  # whatever a damaged or malicious pickle makes torch raise
        why = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"{checkpoint} cannot be read as tensors alone, and running code from it is refused: {why}") from None
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{checkpoint} holds a {type(found).__name__}, not a state dict")
    return state


def check_empty(out: Path) -> None:
    """Raises ValueError if a folder to write weights into is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: choose another --out")


def load_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer from a local folder, without running code of the folder. Raises ValueError if that is not possible."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise ValueError(f"{folder} holds no tokenizer that can be loaded: {e}") from None


def load_pretrained_strict(kind: Module, folder: Path, **more: Module) -> Module:
    """A transformers model from a local folder. Raises ValueError if weights are missing, left over or of another shape."""
    weights_hash(folder)  # says what is wrong before transformers does
    silence_libraries()
    try:
        model, info = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **more
        )
    except (OSError, RuntimeError, KeyError) as e:
        raise ValueError(f"{folder} cannot be loaded as {kind.__name__}: {e}") from None
    wrong = {
        k: sorted(map(str, v))[:2] for k, v in info.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if wrong:
        raise ValueError(f"{folder}: weights do not fit {kind.__name__}: {wrong}")
    return model.eval()
