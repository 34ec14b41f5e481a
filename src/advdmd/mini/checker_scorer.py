"""The checker as a scorer: the upper bound of what any reward can teach in the miniature."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from advdmd.evaluation.benchmark import SuiteItem
from advdmd.mini.suites import CheckerJudge, dpg_verdict, from_json, item_of


@lru_cache(maxsize=2**16)
def _item(prompt: str) -> SuiteItem:
    return item_of(prompt)


class CheckerScorer:
    """mini-dpg's strict score of any prompt that the miniature can read: share of questions that hold, 0 with stray objects."""

    name = "checker"
    fingerprint = "exact"

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        """Scores [N] in [0, 1] of N images [32, 32, 3] uint8. Raises ValueError on a prompt that it cannot read."""
        items = [_item(p) for p in prompts]
        found = CheckerJudge().judge(items, images)
        return torch.tensor([dpg_verdict(i.meta, from_json(j)).strict for i, j in zip(items, found, strict=True)])
