"""Models by folder or by their name on the hub."""

import re
from pathlib import Path

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


def located(name: str | Path) -> Path:
    """A local folder, or the files of OWNER/NAME or OWNER/NAME@REVISION from the hub, without pickles and code.

    Raises ValueError if it is neither, or cannot be had.
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
            snapshot_download(repo, revision=revision or None, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"])
        )
    except Exception as e:  # whatever an unreachable hub or an unknown repository makes the library raise
        raise ValueError(f"{name} is no local folder and cannot be had from the hub: {str(e).splitlines()[0]}") from None
