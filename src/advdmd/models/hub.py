"""Models by folder or by their name on the hub."""

import re
from collections.abc import Sequence
from pathlib import Path

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
SAFE_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")  # no pickles, no code
DTYPE_VARIANTS = ("*.fp16*", "*.bf16*", "*.fp8*")  # the same weights in another type, which nothing here reads


def download(name: str | Path, which: Sequence[str] = SAFE_FILES) -> Path:
    """A local folder, or the files that match `which` of OWNER/NAME or OWNER/NAME@REVISION on the hub, as a folder.

    Raises ValueError if it is neither, or cannot be fetched.
    """
    path = Path(name)
    if path.exists():
        return path
    if not HUB_ID.fullmatch(str(name)):
        raise ValueError(f"{name}: no such folder, and no hub id (OWNER/NAME, or OWNER/NAME@REVISION)")
    from huggingface_hub import snapshot_download

    repo, _, revision = str(name).partition("@")
    try:
        return Path(
            snapshot_download(repo, revision=revision or None, allow_patterns=list(which), ignore_patterns=list(DTYPE_VARIANTS))
        )
    except Exception as e:  # whatever an unreachable hub or an unknown repository makes the library raise
        raise ValueError(f"{name} is no local folder and cannot be had from the hub: {str(e).splitlines()[0]}") from None
