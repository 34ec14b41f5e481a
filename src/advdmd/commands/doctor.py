"""The command doctor: a run's diagnostics beside their ranges in good runs, and what to do."""

from collections.abc import Sequence
from pathlib import Path

from advdmd.commands.audit import AUDIT_FILE, as_text
from advdmd.files import read_object
from advdmd.monitoring import health
from advdmd.recipes import registry


def doctor(run: Path, against: Sequence[Path] = ()) -> str:
    """Every diagnostic of a run beside its range, a line each, and a summary.

    against: good runs to take the ranges from, instead of the shipped ones. Raises ValueError if a folder is not a run.
    """
    metrics = health.read_metrics(run)
    r = registry.resolve(str(health.run_of(run) / "recipe.yaml"))[1]
    ranges = health.ranges_of_runs([health.read_metrics(f) for f in against]) if against else health.ranges_for(r)
    findings = health.diagnose(metrics, ranges)
    lines = []
    for f in findings:
        span = f"{f.range[0]:9.3g} to {f.range[1]:<9.3g}" if f.range else " " * 22
        lines.append(f"{f.status:13}{f.diagnostic.key:28}{f.value:9.3g}   {span} {f.diagnostic.meaning}")
    if (audited := health.run_of(run) / AUDIT_FILE).is_file():
        lines += ["", as_text(read_object(audited, "reward", "agreement", "effect", hint="run advdmd audit again"))]
    summary = health.summarize(metrics, findings) if ranges else health.NO_RANGES
    return "\n".join([*lines, "", f"{metrics[-1]['step'] + 1:.0f} iterations: {summary}"])
