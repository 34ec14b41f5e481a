"""advdmd/monitoring/healthy_ranges.json and the table of docs/health.md, from kept runs: python runs/healthy_ranges.py

Good runs are those of results/healthy (runs/healthy_runs.sh) and the main job, AdvDMD's and DMD2's runs of the claims.
results/unhealthy (runs/unhealthy_runs.sh) has runs made to fail, for the table's last columns.
"""

import json
from collections import defaultdict
from pathlib import Path

from advdmd.monitoring import health
from advdmd.recipes.registry import resolve

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
GOOD = ("healthy/*", "main_job", "claims/h[12]/advdmd-*", "claims/h[12]/dmd2-*")
SHIPPED = ROOT / "src/advdmd/monitoring/healthy_ranges.json"
MARK = "<!-- ranges -->"


def main() -> None:
    runs: dict[str, list[Path]] = defaultdict(list)
    teachers: dict[str, set[str]] = defaultdict(set)
    for folder in (f for pattern in GOOD for f in sorted(RESULTS.glob(pattern)) if f.is_dir()):
        r = resolve(str(folder / "recipe.yaml"))[1]
        key = f"{r.algorithm.name}/{r.algorithm.steps}{r.algorithm.variant}"
        runs[key].append(folder)
        teachers[key].add(r.teacher)
    ranges = {k: health.ranges_of_runs([health.read_metrics(f) for f in fs]) for k, fs in sorted(runs.items())}
    record = {
        "runs": {k: [str(f.relative_to(ROOT)) for f in fs] for k, fs in sorted(runs.items())},
        "teachers": {k: sorted(t) for k, t in sorted(teachers.items())},
        "ranges": {k: {d: [float(f"{v:.4g}") for v in b] for d, b in found.items()} for k, found in ranges.items()},
    }
    SHIPPED.write_text(json.dumps(record, indent=1) + "\n")
    bad = {f.name: f for f in sorted((RESULTS / "unhealthy").glob("*")) if f.is_dir()}
    findings = {n: health.diagnose(health.read_metrics(f), ranges["advdmd/4"]) for n, f in bad.items()}
    names = [n.replace("_", " ") for n in bad]
    lines = [f"| diagnostic | {' | '.join(f'`{k}`' for k in ranges)} | {' | '.join(names)} |"]
    lines.append("|---" * (1 + len(ranges) + len(bad)) + "|")
    for d in health.DIAGNOSTICS:
        if not any(d.key in found for found in ranges.values()):
            continue
        cells = [f"{b[0]:.3g} to {b[1]:.3g}" if (b := found.get(d.key)) else "" for found in ranges.values()]
        for found in findings.values():
            f = next((f for f in found if f.diagnostic.key == d.key), None)
            cells.append("" if f is None else f"**{f.value:.3g}**" if f.remedy else f"{f.value:.3g}")
        lines.append(f"| `{d.key}` | {' | '.join(cells)} |")
    advice = ["| diagnostic | what it is | below the range | above the range |", "|---|---|---|---|"]
    for d in health.DIAGNOSTICS:
        meaning = d.meaning.replace("|", "\\|")
        advice.append(f"| `{d.key}` | {meaning} | {d.low or '-'} | {d.high or '-'} |")
    page = ROOT / "docs/health.md"
    text = page.read_text().partition(MARK)[0]
    page.write_text("\n".join([f"{text}{MARK}", "## What each number means", "", *advice, "", "## Ranges", "", *lines, ""]))
    print(page)


if __name__ == "__main__":
    main()
