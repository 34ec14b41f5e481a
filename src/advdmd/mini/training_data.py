"""The miniature as a recipe's data: scenes drawn when a run starts, and validation scores of the exact checker."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from advdmd.data.loader import BatchConfig, TrainingData, Validation, make_batch_fn
from advdmd.evaluation import statistics
from advdmd.evaluation.generate import image_jobs
from advdmd.evaluation.results import verdict_rows
from advdmd.mini.dataset import MiniDataset, encode_dataset, make_dataset
from advdmd.mini.pipelines import is_mini_pipeline
from advdmd.mini.prompts import SAMPLE_PROMPTS
from advdmd.mini.suites import MiniSuite
from advdmd.mini.world.scene import TASKS, WORLDS
from advdmd.models.backbone import Backbone
from advdmd.models.images import ImageSampler
from advdmd.progress import Progress
from advdmd.types import Cond, Json, Metrics


@dataclass(frozen=True, kw_only=True)
class MiniData:
    """What a run trains on: `num_prompts` prompts of a world of the miniature, with `images_per_prompt` images each.

    Raises ValueError unless both are at least 1.
    """

    world: Literal["full", "half"] = "half"
    num_prompts: int = 1600
    images_per_prompt: int = 4

    def __post_init__(self) -> None:
        if self.num_prompts < 1 or self.images_per_prompt < 1:
            raise ValueError(
                f"MiniData(num_prompts={self.num_prompts}, images_per_prompt={self.images_per_prompt}): both must be at least 1"
            )

    @property
    def has_validation(self) -> bool:
        """The checker scores any image of the miniature."""
        return True

    def open(self, teacher: str) -> "MiniSource":
        """The scenes; `teacher` is checked when it is loaded."""
        return MiniSource(self, teacher)


@lru_cache(maxsize=1)
def _dataset(data: MiniData, seed: int) -> MiniDataset:
    progress = Progress("drawing scenes", data.num_prompts)
    return make_dataset(data.num_prompts, seed, WORLDS[data.world], progress, data.images_per_prompt)


class MiniSource:
    """Scenes of the miniature for a teacher of the miniature."""

    resolution: int | None = None
    needs_encoders = True
    source_images = 0
    plan: object = None
    contents: Json | None = None
    warning = ""

    def __init__(self, data: MiniData, teacher: str):
        self.data, self.teacher = data, teacher

    def load(self, backbone: Backbone, config: BatchConfig) -> TrainingData:
        """Draws and encodes the scenes; prompts are encoded when a batch needs them.

        Raises ValueError if the teacher is not of the miniature.
        """
        if backbone.edits or not is_mini_pipeline(backbone):
            raise ValueError(f"teacher={self.teacher} is not of the miniature: it needs data.folder, from advdmd encode")
        dataset = _dataset(self.data, config.seed)
        latents = encode_dataset(backbone, dataset, Progress("encoding images", self.data.num_prompts))
        ids = backbone.tokenize(dataset.prompts)

        @torch.no_grad()
        def cond(i: Sequence[int]) -> Cond:
            return backbone.encode_text(ids[list(i)])

        def real(p: int, k: int) -> Tensor:
            return latents[p, k % latents.shape[1]]

        with torch.no_grad():
            null, shown = (backbone.encode_text(backbone.tokenize(p)) for p in ([backbone.null_prompt], list(SAMPLE_PROMPTS)))
        return TrainingData(make_batch_fn(len(ids), config, cond, real), dataset.prompts, null, shown)

    def validation(self, images: int) -> Validation | None:
        """The checker's scores on both suites, `images` per short task and as many dense ones in all.

        Short prompts are of the train split (most are too few to be kept back), dense ones of a split that neither training
        nor any test has. The noise is neither's, so no image of a validation is one of an evaluation. "score", the mean of
        both suites' strict scores, selects checkpoints; "diversity" is of the short prompts, which leave more open.
        """
        suites = validation_suites(self.data.world, images)

        def validate(generate: ImageSampler) -> Metrics:
            scores: Metrics = {}
            for suite in suites:
                jobs = image_jobs(suite)
                keys = [("exam", item.id, k) for item, k in jobs]  # a seed: see rng.py
                found = generate([item.prompt for item, _ in jobs], keys)
                table = verdict_rows(suite, suite.judge_images([item for item, _ in jobs], found))
                scores[suite.name] = statistics.summarize(table, "strict")["overall"]["mean"]
                if suite.name == "mini-geneval":
                    scores["diversity"] = suite.spread(found, [item.id for item, _ in jobs]).get("mean", 0.0)
            scores["score"] = (scores["mini-geneval"] + scores["mini-dpg"]) / 2
            return scores

        return validate


def validation_suites(world: str, images: int) -> tuple[MiniSuite, MiniSuite]:
    """The suites of a validation with `images` images per short task, and as many dense ones in all."""
    dense = len(TASKS) * images
    return (
        MiniSuite("mini-geneval", images_per_task=images, split="train", world=world),
        MiniSuite("mini-dpg", images_per_task=dense, prompts_per_task=dense, split="validation", world=world),
    )
