"""The command audit: what a run's reward knows, and how much of its student's gradients is signal."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from advdmd.algorithms.audit import Auditor
from advdmd.distillation import memory
from advdmd.distillation.audit import AuditConfig, Scores, run_audit
from advdmd.distillation.build import Setup, restore
from advdmd.distillation.micro_batch import fitted
from advdmd.evaluation.reward_knowledge import with_interval
from advdmd.files import write_text
from advdmd.models import devices
from advdmd.models.images import to_uint8
from advdmd.models.sampler import decode, encode_prompts
from advdmd.monitoring import health
from advdmd.progress import Progress
from advdmd.recipes import registry
from advdmd.recipes.recipe import Recipe
from advdmd.rewards.registry import load_scorer, parse_scorer
from advdmd.types import Batch, Json

AUDIT_FILE = "audit.json"


def audit(
    run: str | Path,
    config: AuditConfig = AuditConfig(),  # noqa: B008
    prompts: int = 48,
    scorer: str | None = None,
    changes: Sequence[str] = (),
) -> Json:
    """Audit the newest checkpoint of an AdvDMD run, its student as it trains; writes RUN/audit.json and returns it.

    prompts: how many the reward is judged on: of the miniature's mini-geneval, or of the run's data. scorer: "NAME:FOLDER" of a
    metric; in the miniature by default its checker. changes: "key=value" of what may change in a run, such as device. Raises
    ValueError on a run that cannot be audited.
    """
    folder = health.run_of(Path(run))
    record = folder / "recipe.yaml"
    if not record.is_file():
        raise ValueError(f"{run} is not a training run: it has no recipe.yaml")
    name, r = registry.resolve(str(record), changes)
    if prompts < 2:
        raise ValueError(f"prompts={prompts}: at least 2")
    if not r.algorithm.uses_extra_rewards:
        raise ValueError(f"{run} is a run of {r.algorithm.name}: audit is for AdvDMD, whose discriminator is the reward")
    torch.set_num_threads(r.threads)
    r = fitted(r, r.data.open(r.teacher).resolution, 1, memory.this_gpu(devices.resolve_device(r.device)))
    ready, step = restore(folder, r)
    backbone, data, models = ready
    auditor = Auditor(r.algorithm, models, config.images, config.seed)
    judged, scores = _judged(r, ready, prompts, config, scorer)
    batches = [data.batch_fn(r.iterations + i)[0].to(backbone.device) for i in range(2 * config.batches)]
    progress = Progress("gradients", len(batches))
    found: Json = {
        "recipe": name,
        "iteration": step,
        **asdict(config),
        "scorer": scorer or "checker",
        "samples_of_a_half": config.batches * r.batch,
        **run_audit(auditor, models.student, judged, scores, batches, config, progress),
    }
    write_text(folder / AUDIT_FILE, json.dumps(found, indent=1))
    return found


def _judged(r: Recipe, ready: Setup, prompts: int, config: AuditConfig, scorer: str | None) -> tuple[Batch, Scores]:
    """Prompts with config.images samples each, and what scores their final images."""
    backbone, data, _ = ready
    if scorer is None:
        return _judged_by_checker(ready, prompts, config)
    judge = load_scorer(*parse_scorer(scorer))
    steps = (data.batch_fn(r.iterations + 10**6 + i)[0] for i in count())
    first = next(steps)
    alike = (b for b in steps if b.real_latents.shape == first.real_latents.shape)  # images of one size
    parts = [first, *islice(alike, -(-prompts // r.prompts_per_step) - 1)]
    index = torch.cat([p.prompt_index[:: r.algorithm.group_size] for p in parts if p.prompt_index is not None])[:prompts]
    cond = type(parts[0].cond).cat([p.cond for p in parts])[:: r.algorithm.group_size]
    cond = cond[torch.arange(len(index)).repeat_interleave(config.images)]
    texts = [data.prompts[int(i)] for i in index for _ in range(config.images)]

    def scores(x0: Tensor) -> np.ndarray:
        images = list(to_uint8(decode(backbone, x0)))
        return judge.score(images, texts).reshape(-1, config.images).numpy()

    latents = torch.zeros(len(cond), *first.real_latents.shape[1:])
    return Batch(cond, latents).to(backbone.device), scores


def _judged_by_checker(ready: Setup, prompts: int, config: AuditConfig) -> tuple[Batch, Scores]:
    """Prompts of mini-geneval that the miniature trains on, with noise of their own, and the checker's strict verdicts."""
    backbone = ready.backbone
    if not registry.has_miniature():
        raise ValueError("name a metric: --scorer NAME:FOLDER")
    from advdmd.mini.pipelines import is_mini_pipeline
    from advdmd.mini.suites import TASKS, MiniSuite

    if backbone.encoders[0] is None:
        raise ValueError("this run's data are encoded, so its text encoders are not loaded: name --scorer NAME:FOLDER")
    if not is_mini_pipeline(backbone):
        raise ValueError("this teacher is not of the miniature, whose images the checker reads: name --scorer NAME:FOLDER")
    each = -(-prompts // len(TASKS))
    suite = MiniSuite("mini-geneval", images_per_task=each, prompts_per_task=each, split="train")
    items = suite.items()[:: max(1, len(suite.items()) // prompts)][:prompts]
    repeated = [item for item in items for _ in range(config.images)]
    with torch.no_grad():
        cond = encode_prompts(backbone, [item.prompt for item in repeated], backbone.device)

    def scores(x0: Tensor) -> np.ndarray:
        verdicts = suite.judge_images(repeated, to_uint8(decode(backbone, x0)))
        return np.array([v.strict for v in verdicts]).reshape(-1, config.images)

    return Batch(cond, torch.zeros(len(cond), *backbone.latent_shape, device=backbone.device)), scores


def as_text(found: Json) -> str:
    """An audit as lines of text."""
    knows = found["reward"]
    lines = [
        f"{found['recipe']} after {found['iteration']} iterations; {knows['prompts']} prompts x {knows['images']} images, "
        f"scored by {found['scorer']}",
        f"mean score {knows['random']:.3f}; the best of {knows['images']} images of each prompt {knows['oracle']:.3f}",
        "",
        f"{'the discriminator asked about':28} {'correlation within a prompt':32} best of {knows['images']} by its logit",
    ]
    for level, row in knows["levels"].items():
        lines.append(f"{level:28} {with_interval(row['correlation']):32} {with_interval(row['best'])}")
    lines += ["", f"{'gradient of the student':28} {'agreement':10} a step's change of reward, of score"]
    for kind, cosine in found["agreement"].items():
        effect = found["effect"].get(kind)
        moved = f"{with_interval(effect['reward'])}   {with_interval(effect['score'])}" if effect else ""
        lines.append(f"{kind:28} {cosine:<10.3f} {moved}")
    lines.append(f"agreement: cosine of the mean gradients of two halves of {found['samples_of_a_half']} samples")
    return "\n".join(lines)
