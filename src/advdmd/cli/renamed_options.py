"""Options of earlier versions, and what they are called now."""

from collections.abc import Sequence

RENAMED_OPTIONS = {
    "--track": "--report-to",
    "--card": "--gpu-memory",
    "--cards": "--gpus",
    "--reals": "--real-images",
    "--by-shape": "--aspect-buckets",
    "--shard": "--worker",
    "--trained-on": "--allow-training-reward",
}


def check_options(words: Sequence[str]) -> None:
    """Raises ValueError on an option of an earlier version; names the new one."""
    for word in words:
        option = word.partition("=")[0]
        if option in RENAMED_OPTIONS:
            raise ValueError(f"option {option} is now called {RENAMED_OPTIONS[option]}")
