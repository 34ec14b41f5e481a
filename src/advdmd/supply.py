"""Where a run's batches come from: scenes of the miniature's world, or a cache of encoded prompts and images."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from advdmd.data import shapes
from advdmd.data.buckets import Caches, mixed
from advdmd.data.deal import Deal, make_deal
from advdmd.look import LOOK_PROMPTS
from advdmd.models import load
from advdmd.recipe import Cached, Data, Recipe
from advdmd.train.book import Progress
from advdmd.types import ALONE, Cond, Team
from advdmd.world.scene import WORLDS


class Supply(NamedTuple):
    """What a run needs from its data: `deal` is pure in the step; `look` are conditions to draw while training."""

    deal: Deal
    prompts: Sequence[str]
    null: Cond
    look: Cond


@lru_cache(maxsize=1)
def _pool(d: Data, seed: int) -> shapes.Pool:
    return shapes.make_pool(d.prompts, seed, WORLDS[d.world], Progress("drawing scenes", d.prompts), d.reals)


def open_cache(r: Recipe) -> Caches | None:
    """The recipe's cache, or one for each size, if its data are one; checked against its teacher before anything is loaded."""
    if not isinstance(r.data, Cached):
        return None
    found = Caches(Path(r.data.folder))
    found.expect(load.identity(load.folder_of(r.teacher)))
    found.with_images()
    return found


def supply(r: Recipe, backbone: Any, encoded: Caches | None = None, team: Team = ALONE) -> Supply:
    """A recipe's data, drawn or `encoded`, ready to deal to this process of a team."""
    size = (r.prompts_per_step, r.algorithm.group, r.seed)
    if encoded:
        first, *others = encoded.parts
        deals = [make_deal(len(p.prompts), *size, p.cond, p.real, team, bool(others)) for p in encoded.parts]
        deal = mixed(deals, [len(p.prompts) for p in encoded.parts], r.seed) if others else deals[0]
        shown = range(min(len(LOOK_PROMPTS), len(first.prompts)))
        return Supply(deal, encoded.prompts, encoded.null, first.cond(shown))
    assert isinstance(r.data, Data)
    pool = _pool(r.data, r.seed)
    latents, ids = shapes.encode(backbone, pool, Progress("encoding images", r.data.prompts)), backbone.tokenize(pool.prompts)

    @torch.no_grad()
    def embed(ids: Any) -> Cond:
        return backbone.embed(ids)

    null, look = (embed(backbone.tokenize(p)) for p in ([""], list(LOOK_PROMPTS)))
    real = lambda p, k: latents[p, k % latents.shape[1]]  # noqa: E731
    return Supply(make_deal(len(ids), *size, lambda i: embed(ids[list(i)]), real, team), pool.prompts, null, look)
