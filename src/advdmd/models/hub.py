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
        raise ValueError(f"{name} is no local folder and cannot be had from the hub: {hub_error(repo, e)}") from None


def hub_error(repo: str, error: Exception) -> str:
    """Why the hub does not give a repository, and the way to it."""
    from huggingface_hub import errors

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)  # type: ignore[arg-type]
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if any(isinstance(e, errors.GatedRepoError) for e in chain):
        return f"it is gated. Accept its licence on the page of {repo}, then run `hf auth login` ({first})"
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain):
        return f"there is no such revision ({first})"
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in chain):
        return f"there is no such repository, or it is private: check the name, or run `hf auth login` ({first})"
    return first


def id_of_snapshot(path: Path) -> str | None:
    """OWNER/NAME of a folder in the hub client's cache, "models--OWNER--NAME/snapshots/REVISION"; None of another folder."""
    parts = path.absolute().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return None
    return "/".join(parts[-3].removeprefix("models--").split("--"))
