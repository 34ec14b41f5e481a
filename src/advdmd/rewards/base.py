"""What scores an image for its prompt with one number: a metric to report, or a reward to train with."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor


class Scorer(Protocol):
    """A new one is one file. Higher is better; `name` goes beside every figure, `fingerprint` tells weights apart."""

    name: str
    fingerprint: str

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        """Scores [N] fp32 of N images [H, W, 3] uint8 for N prompts."""
        ...
