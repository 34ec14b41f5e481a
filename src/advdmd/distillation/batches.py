"""Where a run's batches come from: scenes of the miniature's world, or a cache of encoded prompts and images."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from advdmd.data.aspect_buckets import BucketedCache, mix_buckets
from advdmd.data.loader import TrainingData, make_batch_fn
from advdmd.mini import dataset
from advdmd.mini.prompts import SAMPLE_PROMPTS
from advdmd.mini.world.scene import WORLDS
from advdmd.models import fingerprints, loading
from advdmd.progress import Progress
from advdmd.recipes.recipe import CachedData, MiniData, Recipe
from advdmd.types import ONE_RANK, Cond, Ranks


@lru_cache(maxsize=1)
def _pool(d: MiniData, seed: int) -> dataset.MiniDataset:
    return dataset.make_dataset(d.prompts, seed, WORLDS[d.world], Progress("drawing scenes", d.prompts), d.reals)


def open_cache(r: Recipe) -> BucketedCache | None:
    """The recipe's cache, or one for each size, if its data are one; checked against its teacher before anything is loaded."""
    if not isinstance(r.data, CachedData):
        return None
    found = BucketedCache(Path(r.data.folder))
    found.expect(fingerprints.encoder_fingerprint(loading.pipeline_folder(r.teacher)))
    found.with_images()
    return found


def load_training_data(r: Recipe, backbone: Any, encoded: BucketedCache | None = None, team: Ranks = ONE_RANK) -> TrainingData:
    """A recipe's data, drawn or `encoded`, ready to deal to this process of a team."""
    size = (r.prompts_per_step, r.algorithm.group, r.seed)
    if encoded:
        first, *others = encoded.parts
        deals = [make_batch_fn(len(p.prompts), *size, p.cond, p.real, team, bool(others)) for p in encoded.parts]
        deal = mix_buckets(deals, [len(p.prompts) for p in encoded.parts], r.seed) if others else deals[0]
        shown = range(min(len(SAMPLE_PROMPTS), len(first.prompts)))
        return TrainingData(deal, encoded.prompts, encoded.null, first.cond(shown))
    assert isinstance(r.data, MiniData)
    pool = _pool(r.data, r.seed)
    latents, ids = (
        dataset.encode_dataset(backbone, pool, Progress("encoding images", r.data.prompts)),
        backbone.tokenize(pool.prompts),
    )

    @torch.no_grad()
    def embed(ids: Any) -> Cond:
        return backbone.embed(ids)

    null, look = (embed(backbone.tokenize(p)) for p in ([""], list(SAMPLE_PROMPTS)))
    real = lambda p, k: latents[p, k % latents.shape[1]]  # noqa: E731
    return TrainingData(make_batch_fn(len(ids), *size, lambda i: embed(ids[list(i)]), real, team), pool.prompts, null, look)
