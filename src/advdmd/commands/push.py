"""Publishing an export on the hub."""

from collections.abc import Callable
from pathlib import Path

from advdmd.models import loading
from advdmd.models.hub import HUB_ID, hub_error


def check_repository(repo: str) -> None:
    """Raises ValueError if a name is not OWNER/NAME."""
    if not HUB_ID.fullmatch(repo) or "@" in repo:
        raise ValueError(f"--push {repo}: write OWNER/NAME")


def push(folder: Path, repo: str, private: bool = False, dry_run: bool = False, say: Callable[[str], object] = print) -> None:
    """Upload an exported folder as the model repository OWNER/NAME, which is made if there is none; says what goes.

    dry_run: says it, and nothing is sent. Raises ValueError on another name, if the folder is no export, or if the hub refuses.
    """
    check_repository(repo)
    if not (folder / "README.md").is_file():
        raise ValueError(f"{folder} is no export: it has no README.md")
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("."))
    for file in files:
        say(f"{file.stat().st_size / 1e6:9.1f} MB  {file.relative_to(folder)}")
    total, kind = sum(f.stat().st_size for f in files) / 1e6, "private" if private else "public"
    base = loading.read_metadata(folder).get("base_model", "the base model")
    say(f"{total:9.1f} MB  in {len(files)} files, to the {kind} repository {repo}; the licence of {base} applies")
    if dry_run:
        return
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="A few-step student, made with advdmd")
    except Exception as e:  # whatever an unreachable hub or a refused token makes the library raise
        raise ValueError(f"--push {repo}: {hub_error(repo, e)}; the export is whole in {folder}") from None
