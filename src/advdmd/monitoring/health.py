"""Whether a run is healthy: what each logged number means, its range in good runs, and what to do outside of it.

The ranges (healthy_ranges.json) were measured by runs/healthy_ranges.py on good runs of the miniature, for each algorithm and
number of steps. Losses and norms depend on the model: with another one, compare to a good run of your own.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from advdmd.files import read_lines
from advdmd.monitoring.reward_hacking import reward_hacking_step
from advdmd.recipes.recipe import Recipe
from advdmd.recipes.renamed import new_metrics

RunMetrics = Sequence[Mapping[str, float]]  # lines of metrics.jsonl
Range = tuple[float, float]
NO_RANGES = "no ranges for this teacher, algorithm and number of steps: compare with a good run, advdmd doctor --against"
LATE = 0.25  # what is judged: the last quarter of a run; what ranges are measured on: all but its first


@dataclass(frozen=True)
class Diagnostic:
    """One logged number. `low` and `high` say what to do below and above its range; empty where that side is harmless."""

    key: str
    meaning: str
    low: str = ""
    high: str = ""


_AHEAD = "the discriminator is far ahead of the student: lower discriminator_lr_scale and trunk_lr_scale"
_BLIND = (
    "the discriminator learns nothing here: raise discriminator_lr_scale or algorithm.fake_score_updates, "
    "or set discriminator.trunk=own"
)


def _auc(level: int) -> Diagnostic:
    return Diagnostic(
        f"discriminator/auc_{level}",
        f"AUC of real against generated at level {level} (.5: blind, 1: separated)",
        high=_AHEAD,
        low="" if level == 1 else _BLIND,
    )


DIAGNOSTICS = (
    *map(_auc, (1, 2, 3, 4)),
    Diagnostic("discriminator/auc", "AUC of real against generated (.5: blind, 1: separated)", high=_AHEAD, low=_BLIND),
    Diagnostic(
        "discriminator/loss",
        "GAN loss of the discriminator, mismatched captions included",
        low=_AHEAD,
        high="it learns nothing or diverges: raise discriminator_lr_scale if the loss stands still, lower it if the loss rises",
    ),
    Diagnostic(
        "discriminator/logit_gap",
        "logit of real images minus that of generated ones",
        high="the logits grow without bound: lower discriminator_lr_scale",
    ),
    Diagnostic(
        "fake_score/loss",
        "flow-matching loss of the fake score on the student's images",
        high="it lags: raise fake_score_optimizer.lr or algorithm.fake_score_updates, or lower dm_optimizer.lr",
    ),
    Diagnostic(
        "fake_score/grad_norm", "gradient norm of fake score and discriminator", high="unstable: lower fake_score_optimizer.lr"
    ),
    Diagnostic(
        "student/dm_loss",
        "distribution matching: half the mean squared difference of fake score and teacher, normalised as in DMD",
        high="the student moves away from the teacher: lower dm_optimizer.lr, or raise algorithm.fake_score_updates",
        low="near zero: is the student still learning?",
    ),
    Diagnostic("student/gan_loss", "GAN loss of the student", high="generated images are easy to tell: " + _AHEAD),
    Diagnostic(
        "student/dm_grad_norm",
        "gradient norm of distribution matching and GAN",
        high="unstable: lower dm_optimizer.lr or guidance_scale",
    ),
    Diagnostic("policy/grad_norm", "gradient norm of the policy loss", high="lower policy_optimizer.lr"),
    Diagnostic(
        "student/policy_dm_cosine",
        "cosine of the mean gradients of policy and distribution matching",
        low="the two oppose each other: lower policy_optimizer.lr or guidance_scale",
    ),
    Diagnostic(
        "student/policy_dm_ratio",
        "length of the policy's mean gradient beside that of distribution matching",
        high="the policy outweighs distribution matching: lower policy_optimizer.lr",
    ),
    Diagnostic(
        "student/within_group_std",
        "standard deviation of final latents within a prompt's group",
        low="a prompt gives one image: raise algorithm.gan_loss_weight, or lower guidance_scale or policy_optimizer.lr",
        high="prompts matter little: raise guidance_scale, or algorithm.dm_only_iterations",
    ),
    Diagnostic(
        "student/within_group_std_shared_start",
        "the same in iterations with a policy update, where a group starts from one noise",
        low="steps change little: all actions of a group are alike; algorithm.shared_start=false compares other starts too",
    ),
    Diagnostic(
        "policy/gate",
        "mean AUC gate, which scales the policy's learning rate",
        low="the discriminator cannot tell real from generated where it pays: see discriminator/auc",
    ),
    Diagnostic(
        "policy/agreement",
        "cosine of the two halves of gathered policy gradients (policy_step=agreement): 1 is all signal, 0 all noise",
        low="noise: raise algorithm.max_policy_rollouts or prompts_per_step; advdmd audit says what the reward knows",
    ),
    Diagnostic(
        "policy/step_share",
        "share of policy_optimizer.lr that a gathered step was long, by its agreement",
        low="noise: raise algorithm.max_policy_rollouts or prompts_per_step; advdmd audit says what the reward knows",
    ),
    Diagnostic(
        "reward/final_std",
        "standard deviation of the reward within a prompt's group, final images",
        low="the discriminator sees no difference between a prompt's images: advantages are noise",
    ),
    Diagnostic(
        "policy/frac_zero_advantage",
        "share of advantages that are 0",
        high="the AUC gate is 0 or groups are alike: see discriminator/auc",
    ),
    Diagnostic(
        "policy/max_ratio_error",
        "largest |ratio - 1| on replay",
        high="the trajectory is not the policy's own: numbers drift, use dtype=float32",
    ),
    Diagnostic("student/loss", "mean loss of TwinFlow's quarters", high="lower dm_optimizer.lr"),
    Diagnostic("student/grad_norm", "gradient norm of TwinFlow", high="unstable: lower dm_optimizer.lr"),
    Diagnostic(
        "cost/efficiency",
        "forward passes an iteration must make x time of one / its time",
        low="time goes elsewhere: a larger algorithm.micro_batch_size or a smaller fake_score_updates; is the machine busy?",
    ),
    Diagnostic(
        "eval/diversity",
        "variation in what the prompt does not fix; 1 is the renderer's",
        low="lower guidance_scale, or raise algorithm.gan_loss_weight",
    ),
)


def shipped_ranges() -> dict[str, dict[str, Range]]:
    """The shipped ranges by "ALGORITHM/STEPS": noise levels 1, 2, ... of a student depend on its number of steps."""
    return {k: {key: (low, high) for key, (low, high) in v.items()} for k, v in _shipped()["ranges"].items()}


def _shipped() -> dict[str, dict[str, dict[str, Range]]]:
    return json.loads((files("advdmd") / "monitoring" / "healthy_ranges.json").read_text())


def ranges_for(r: Recipe) -> dict[str, Range]:
    """The shipped ranges, if they are of runs like this one: same algorithm, number of steps and, among others, teacher."""
    key = f"{r.algorithm.name}/{r.algorithm.steps}{r.algorithm.variant}"
    return shipped_ranges().get(key, {}) if r.teacher in _shipped()["teachers"].get(key, ()) else {}


def ranges_of_runs(runs: Sequence[RunMetrics]) -> dict[str, Range]:
    """Ranges of all diagnostics over good runs: from the lowest 2 % quantile of any run to the highest 98 % quantile."""
    out: dict[str, Range] = {}
    for d in DIAGNOSTICS:
        values = [sorted(m[d.key] for m in run[int(len(run) * LATE) :] if d.key in m) for run in runs]
        values = [v for v in values if len(v) > 1]
        if values:
            low = min(v[int(0.02 * len(v))] for v in values)
            out[d.key] = (low, max(v[math.ceil(0.98 * len(v)) - 1] for v in values))
    return out


@dataclass(frozen=True)
class Finding:
    """A diagnostic's late median in a run, and its range in good runs, if it was measured."""

    diagnostic: Diagnostic
    value: float
    range: Range | None

    @property
    def remedy(self) -> str:
        """What to do; empty if there is nothing to do."""
        if self.range is None:
            return ""
        if not math.isfinite(self.value):
            return "not a number: start again from the last checkpoint with lower learning rates"
        low, high = self.range
        return self.diagnostic.low if self.value < low else self.diagnostic.high if self.value > high else ""

    @property
    def status(self) -> str:
        """One of ok, out, or not measured where there is no range."""
        return "not measured" if self.range is None else "out" if self.remedy else "ok"


def diagnose(run: RunMetrics, ranges: Mapping[str, Range]) -> list[Finding]:
    """A finding for every diagnostic that a run has logged in its last quarter."""
    out = []
    for d in DIAGNOSTICS:
        values = sorted(m[d.key] for m in run[int(len(run) * (1 - LATE)) :] if d.key in m)
        if values:
            out.append(Finding(d, values[len(values) // 2], ranges.get(d.key)))
    return out


def summarize(run: RunMetrics, findings: Sequence[Finding]) -> str:
    """One line: "healthy", or what is out of range and what to do."""
    out = [
        f"{f.diagnostic.key} {f.value:.3g}, range {f.range[0]:.3g} to {f.range[1]:.3g}: {f.remedy}"
        for f in findings
        if f.remedy and f.range
    ]
    if (step := reward_hacking_step(run)) is not None:
        out.append(
            f"reward hacking: the reward rises and the score falls after {step} iterations: use the best checkpoint, lower "
            "policy_optimizer.lr"
        )
    return "; ".join(out) if out else "healthy"


def summary(run: RunMetrics, r: Recipe) -> str:
    """One line about a run by the shipped ranges, if there are any for such a run."""
    ranges = ranges_for(r)
    return summarize(run, diagnose(run, ranges)) if ranges else NO_RANGES


def run_of(folder: Path) -> Path:
    """A run's own folder; the main job's folder stands for the run in it."""
    return folder / "run" if (folder / "run/recipe.yaml").is_file() else folder


def read_metrics(folder: Path) -> RunMetrics:
    """A run's metrics, also of earlier versions. Raises ValueError if there are none."""
    path = run_of(folder) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} is not a training run: there is no {path}")
    found = [new_metrics(line) for line in read_lines(path, "step", hint="delete that line")]
    if not found:
        raise ValueError(f"{path} is empty: wait for the first iteration")
    return found
