"""constraints.txt from what is installed: the exact versions of all that advdmd and its extras need, directly or not.

.venv/bin/python runs/lock.py   (after `make test`; wandb and trackio are left to those who want them)
"""

import importlib.metadata as metadata
import re
from pathlib import Path

from packaging.requirements import Requirement

PINS = Path(__file__).parent.parent / "constraints.txt"


def needed(name: str, extras: tuple[str, ...]) -> dict[str, str]:
    """Normalised name -> version of a distribution and all it needs in this environment."""
    found: dict[str, str] = {}
    visited: set[tuple[str, tuple[str, ...]]] = set()
    todo = [(name, extras)]
    while todo:
        at = name, extras = todo.pop()
        if at in visited:
            continue
        visited.add(at)
        found[re.sub(r"[-_.]+", "-", name).lower()] = metadata.version(name).partition("+")[0]
        for r in map(Requirement, metadata.requires(name) or []):
            if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                todo.append((r.name, tuple(sorted(r.extras))))
    return found


def main() -> None:
    found = needed("advdmd", ("dev", "plots"))
    del found["advdmd"]
    PINS.write_text("".join(f"{name}=={version}\n" for name, version in sorted(found.items())))
    print(f"{PINS}: {len(found)} pins")


if __name__ == "__main__":
    main()
