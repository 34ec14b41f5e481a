"""Weights of the models that judge: read from local folders, strictly, and hashed."""

import hashlib
from pathlib import Path
from typing import Any

from advdmd.models.load import quiet
from advdmd.train.checkpoint import file_hash


def weights_hash(folder: Path) -> str:
    """One hash over all safetensors of a folder. Raises ValueError if there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no safetensors: name a model's folder (pickled weights are never loaded)")
    return hashlib.sha256("".join(file_hash(f) for f in files).encode()).hexdigest()[:16]


def load_strictly(kind: Any, folder: Path, **more: Any) -> Any:
    """A transformers model from a local folder; missing, left-over or misshapen weights are errors (ValueError)."""
    weights_hash(folder)  # says what is wrong before transformers does
    quiet()
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
