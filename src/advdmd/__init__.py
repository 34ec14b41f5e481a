"""AdvDMD: few-step students of text-to-image flow models, distilled with an online adversarial reward (arXiv 2604.28126).

The public functions are imported when they are first used: `resolve`, `train`, `sample`, `evaluate`, `export`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advdmd.commands.evaluate import evaluate
    from advdmd.commands.export import export
    from advdmd.commands.sample import sample
    from advdmd.commands.train import train
    from advdmd.recipes.registry import resolve

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "export", "resolve", "sample", "train"]

_MODULES = {
    "evaluate": "advdmd.commands.evaluate",
    "export": "advdmd.commands.export",
    "sample": "advdmd.commands.sample",
    "train": "advdmd.commands.train",
    "resolve": "advdmd.recipes.registry",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'advdmd' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
