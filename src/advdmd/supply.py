"""Where a run's batches come from: scenes of the miniature's world, or a cache of encoded prompts and images."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from advdmd.data import cache, shapes
from advdmd.look import LOOK_PROMPTS
from advdmd.models import load
from advdmd.recipe import Cached, Data, Recipe
from advdmd.rng import ALONE
from advdmd.train.book import Progress
from advdmd.types import Batch, Cond, Team
from advdmd.world.scene import WORLDS


class Supply(NamedTuple):
    """What a run needs from its data: `deal` is pure in the step; `look` are conditions to draw while training."""

    deal: Callable[[int], tuple[Batch, list[int]]]
    prompts: Sequence[str]
    null: Cond
    look: Cond


@lru_cache(maxsize=1)
def _pool(d: Data, seed: int) -> shapes.Pool:
    return shapes.make_pool(d.prompts, seed, WORLDS[d.world], Progress("drawing scenes", d.prompts), d.reals)


def _drawn(r: Recipe, d: Data, backbone: Any, team: Team) -> Supply:
    """Groups of one prompt each, with real latents of the same prompt."""
    G, pool = r.algorithm.group, _pool(d, r.seed)
    latents, ids = shapes.encode(backbone, pool, Progress("encoding images", d.prompts)), backbone.tokenize(pool.prompts)

    def deal(step: int) -> tuple[Batch, list[int]]:
        every, order = shapes.deal(d.prompts, r.prompts_per_step, r.seed, step)
        i, order = cache.shared(every, order, team)
        samples = [n * G + g for n in order for g in range(G)]
        which = torch.tensor([(g + n // d.prompts) % d.reals for n in order for g in range(G)])
        member = torch.arange(1, len(i)).repeat_interleave(G)
        with torch.no_grad():
            cond = backbone.embed(ids[i])
        i = i[member]
        return Batch(cond[member], latents[i, which], i, cond[member - 1]), samples

    with torch.no_grad():
        null, look = (backbone.embed(backbone.tokenize(p)) for p in ([""], list(LOOK_PROMPTS)))
    return Supply(deal, pool.prompts, null, look)


def open_cache(r: Recipe) -> cache.Cache | None:
    """The recipe's cache, if its data are one; checked against its teacher before anything is loaded."""
    if not isinstance(r.data, Cached):
        return None
    found = cache.Cache(Path(r.data.folder))
    found.expect(load.identity(load.folder_of(r.teacher)))
    return found


def supply(r: Recipe, backbone: Any, team: Team = ALONE) -> Supply:
    """A recipe's data, ready to deal to this process of a team."""
    if isinstance(r.data, Data):
        return _drawn(r, r.data, backbone, team)
    found = cache.Cache(Path(r.data.folder))
    deal = cache.make_deal(found, r.prompts_per_step, r.algorithm.group, r.seed, team)
    return Supply(deal, found.prompts, found.null, found.cond(range(min(len(LOOK_PROMPTS), len(found.prompts)))))
