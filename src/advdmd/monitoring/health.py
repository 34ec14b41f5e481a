"""Whether a run is healthy: what each logged number means, its range in good runs, and what to do outside of it.

The ranges (bands.json) were measured by runs/bands.py on the miniature's good runs. Losses and norms depend on the model: with
another one, compare to a good run of your own.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from advdmd.algorithms.twinflow import TwinFlow
from advdmd.files import read_lines
from advdmd.monitoring.reward_hacking import reward_hacking_step
from advdmd.recipes.recipe import Recipe

RunMetrics = Sequence[Mapping[str, float]]
Range = tuple[float, float]
MEASURED_TEACHERS = ("mini-sd3", "mini-sd35")  # teachers of the runs that the ranges come from
NO_RANGES = "no ranges for this teacher, algorithm and number of steps: compare with a good run, advdmd doctor --against"
LATE = 0.25  # what is judged: the last quarter of a run; what bands are measured on: all but its first


@dataclass(frozen=True)
class Diagnostic:
    """One logged number. `low` and `high` say what to do below and above its band; empty where that side is harmless."""

    key: str
    meaning: str
    low: str = ""
    high: str = ""


def _level(k: int) -> Diagnostic:
    return Diagnostic(
        f"critic/auc_{k}",
        f"how well the critic tells real from generated at level {k} (.5: not at all, 1: always)",
        high="the critic is far ahead of the student: lower heads_rate and trunk_rate, or match longer first",
        low="" if k == 1 else "the critic learns nothing here: raise heads_rate or critic_steps, or give it a trunk of its own",
    )


DIAGNOSTICS = (
    *map(_level, (1, 2, 3, 4)),
    Diagnostic(
        "critic/gap", "logit of real images minus that of generated ones", high="the critic runs away: lower heads_rate"
    ),
    Diagnostic(
        "fake/loss",
        "how far the fake score is from where the student is",
        high="it lags: raise fake.lr or critic_steps, or lower match.lr; matching then follows an old student",
    ),
    Diagnostic("fake/norm", "gradient norm of fake score and critic", high="unstable: lower fake.lr"),
    Diagnostic(
        "student/match/loss",
        "size of the step that distribution matching asks for, relative to the teacher's own",
        high="the student runs from the teacher: lower match.lr, or let the fake score catch up",
        low="matching asks for nothing: is the student still learning?",
    ),
    Diagnostic("student/match/norm", "gradient norm of matching", high="unstable: lower match.lr or guidance"),
    Diagnostic("student/policy/norm", "gradient norm of the policy turns", high="lower algorithm.clip or policy.lr"),
    Diagnostic(
        "student/cosine",
        "cosine of the mean gradients of matching and of the policy turns",
        low="the two pull against each other: lower policy.lr or guidance",
    ),
    Diagnostic(
        "student/ratio",
        "length of the policy turns' mean gradient beside that of matching",
        high="the policy drowns matching: lower algorithm.clip or policy.lr",
    ),
    Diagnostic(
        "path/group_spread",
        "standard deviation of final latents within a prompt's group",
        low="a prompt gives one image: raise algorithm.gan, or lower guidance or policy.lr",
        high="prompts say little: raise guidance, or match longer",
    ),
    Diagnostic(
        "reward/end_spread",
        "spread of the reward within a prompt's group, final images",
        low="the critic sees no difference between a prompt's images: advantages are noise",
    ),
    Diagnostic("policy/zero_share", "share of advantages that are 0", high="the gate is shut or groups are alike: see the AUC"),
    Diagnostic(
        "policy/ratio_off", "largest |ratio - 1| on replay", high="the path is not the policy's own: numbers drift, use float32"
    ),
    Diagnostic(
        "cost/eta",
        "forwards an iteration must make x time of one / its time",
        low="time goes elsewhere: larger algorithm.micro, fewer critic_steps, other work on the machine?",
    ),
    Diagnostic(
        "exam/diversity", "spread of what prompts leave open, 1: the renderer's", low="lower guidance, or raise algorithm.gan"
    ),
)


def healthy_ranges(steps: int = 4) -> dict[str, Range]:
    """The shipped ranges, of students of so many steps: levels 1, 2, ... are other noise levels for others. None if unknown."""
    told = json.loads((files("advdmd") / "monitoring" / "healthy_ranges.json").read_text())["bands"].get(str(steps), {})
    return {k: (low, high) for k, (low, high) in told.items()}


def ranges_for(r: Recipe) -> dict[str, Range]:
    """The shipped ranges where they are of runs like this one: a miniature's teacher, distribution matching, as many steps."""
    return healthy_ranges(r.algorithm.steps) if r.teacher in MEASURED_TEACHERS and not isinstance(r.algorithm, TwinFlow) else {}


def ranges_of_runs(runs: Sequence[RunMetrics]) -> dict[str, Range]:
    """Ranges of all panels over good runs: from the lowest 2 % quantile of any to the highest 98 % quantile."""
    out: dict[str, Range] = {}
    for panel in DIAGNOSTICS:
        found = [sorted(m[panel.key] for m in run[int(len(run) * LATE) :] if panel.key in m) for run in runs]
        found = [v for v in found if len(v) > 1]
        if found:
            low = min(v[int(0.02 * len(v))] for v in found)
            out[panel.key] = (low, max(v[math.ceil(0.98 * len(v)) - 1] for v in found))
    return out


@dataclass(frozen=True)
class Finding:
    """A panel's late median in a run beside its band."""

    panel: Diagnostic
    value: float
    band: Range | None

    @property
    def remedy(self) -> str:
        """What to do, empty if there is nothing."""
        if self.band is None:
            return ""
        if not math.isfinite(self.value):
            return "not a number: start again from the last checkpoint with lower rates"
        return self.panel.low if self.value < self.band[0] else self.panel.high if self.value > self.band[1] else ""


def diagnose(run: RunMetrics, ranges: Mapping[str, Range]) -> list[Finding]:
    """Every panel that a run logged late."""
    out = []
    for panel in DIAGNOSTICS:
        seen = sorted(m[panel.key] for m in run[int(len(run) * (1 - LATE)) :] if panel.key in m)
        if seen:
            out.append(Finding(panel, seen[len(seen) // 2], ranges.get(panel.key)))
    return out


def summarize(run: RunMetrics, findings: Sequence[Finding]) -> str:
    """One line: healthy, or what is out and the remedy."""
    out = [
        f"{f.panel.key} {f.value:.3g}, band {f.band[0]:.3g} to {f.band[1]:.3g}: {f.remedy}"
        for f in findings
        if f.remedy and f.band
    ]
    if (step := reward_hacking_step(run)) is not None:
        out.append(f"reward and score parted after {step} iterations: keep the best average, lower policy.lr")
    return "; ".join(out) if out else "healthy"


def summary(run: RunMetrics, r: Recipe) -> str:
    """The verdict by the shipped ranges, if there are any for such a run."""
    if not (known := ranges_for(r)):
        return NO_RANGES
    return summarize(run, diagnose(run, known))


def run_of(folder: Path) -> Path:
    """The run's own folder; the main job's stands for the run in it."""
    return folder / "run" if (folder / "run/recipe.yaml").is_file() else folder


def read(folder: Path) -> RunMetrics:
    """A run's metrics. Raises ValueError if there are none."""
    path = run_of(folder) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} is not a training run: there is no {path}")
    found = read_lines(path, "step", way_out="delete that line")
    if not found:
        raise ValueError(f"{path} is empty: let the run go on")
    return found
