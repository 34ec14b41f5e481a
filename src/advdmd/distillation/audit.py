"""An audit of a run: what its discriminator knows of the student's images, and which way its gradients point."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from advdmd.algorithms.audit import Auditor, final_image_at
from advdmd.evaluation.reward_knowledge import best_of_n, paired_change, within_prompt_correlation
from advdmd.rollout import Trajectory
from advdmd.training.learner import Learner
from advdmd.types import Batch, Json

FINAL_LEVELS = (0.02, 0.1, 0.3, 0.5)  # noise levels at which the discriminator is asked about final images
EFFECT_LEVEL = 0.3  # of them, the one by which a step's effect on the reward is measured
Scores = Callable[[Tensor], np.ndarray]  # final latents [P N, ...], prompt by prompt -> scores [P, N]


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """images: samples of each prompt that the reward is judged on, at least 2. batches: iterations' samples in each half of a
    gradient. step_size: length of a step, as a share of the weights' norm. Raises ValueError on values out of range."""

    images: int = 8
    batches: int = 8
    step_size: float = 0.003
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images < 2 or self.batches < 1 or not 0 < self.step_size < 1:
            raise ValueError(
                f"images={self.images}, batches={self.batches}, step_size={self.step_size}: at least 2 images and 1 batch, a "
                "step inside (0, 1)"
            )


def reward_knowledge(auditor: Auditor, trajectory: Trajectory, prompts: Batch, scores: Scores) -> Json:
    """For each level the within-prompt correlation of the discriminator's logit with the scores, and best of N.

    trajectory: of the prompts' samples. Levels are those of the states that steps lead to, and FINAL_LEVELS of final images.
    """
    found = scores(trajectory.x[-1])
    levels: Json = {}
    for level, logits in auditor.logits(trajectory, prompts, FINAL_LEVELS).items():
        reward = logits.cpu().numpy().reshape(found.shape)
        levels[level] = {"correlation": within_prompt_correlation(reward, found), "best": best_of_n(reward, found)}
    about = {"prompts": found.shape[0], "images": found.shape[1]}
    return {**about, "random": float(found.mean()), "oracle": float(found.max(1).mean()), "levels": levels}


def agreement(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Json:
    """Cosine of the mean gradients [D] of two independent halves, by estimator: 1 is all signal, 0 all noise."""
    return {name: float(torch.cosine_similarity(a[name], b[name], dim=0)) for name in a if a[name].any() and b[name].any()}


def effects(
    auditor: Auditor,
    prompts: Batch,
    scores: Scores,
    directions: Mapping[str, Tensor],
    before: Trajectory,
    step_size: float,
    second_moments: Tensor | None = None,
) -> Json:
    """What one step against each mean gradient [D] does to the reward and to the score of the same prompts and noise.

    Gradients are divided by the root of second moments [D], as Adam would, and scaled to step_size of the weights' norm.
    """
    found = scores(before.x[-1])

    def reward(trajectory: Trajectory) -> np.ndarray:
        logits = auditor.logits(trajectory, prompts, [EFFECT_LEVEL])[final_image_at(EFFECT_LEVEL)]
        return logits.cpu().numpy().reshape(found.shape)

    out: Json = {}
    for kind, g in directions.items():
        if not g.any():
            continue
        with stepped(auditor, g if second_moments is None else g / second_moments, step_size):
            after = auditor.rollout(prompts)
            change, gain = paired_change(reward(after), reward(before)), paired_change(scores(after.x[-1]), found)
            out[kind] = {"reward": change, "score": gain}
    return out


@contextmanager
def stepped(auditor: Auditor, direction: Tensor, size: float) -> Iterator[None]:
    """Inside, the student's weights are moved against a direction [D], by `size` of their norm."""
    params = auditor.student_parameters()
    kept = [p.detach().clone() for p in params]
    norm = torch.stack([p.square().sum() for p in kept]).sum().sqrt()
    step = direction * (size * norm / direction.norm())
    try:
        with torch.no_grad():
            for p, s in zip(params, step.split([p.numel() for p in params]), strict=True):
                p -= s.view_as(p)
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(params, kept, strict=True):
                p.copy_(old)


def run_audit(
    auditor: Auditor,
    student: Learner,
    prompts: Batch,
    scores: Scores,
    batches: list[Batch],
    config: AuditConfig,
    progress: Callable[[int], object],
) -> Json:
    """All of an audit: "reward", "agreement" of the gradients of both halves of `batches`, "effect" of a step along each.

    prompts: with config.images samples each.
    """
    trajectory, half = auditor.rollout(prompts), len(batches) // 2
    knows = reward_knowledge(auditor, trajectory, prompts, scores)
    halves = [auditor.gradients(batches[i : i + half], 1 + i, progress) for i in (0, half)]
    mean = {kind: (halves[0][kind] + halves[1][kind]) / 2 for kind in halves[0]}
    moved = effects(auditor, prompts, scores, mean, trajectory, config.step_size, student.second_moments("dm"))
    return {"reward": knows, "agreement": agreement(*halves), "effect": moved}
