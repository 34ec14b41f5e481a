"""src/advdmd/bands.json and docs/health.md's table, from the kept good runs: python runs/bands.py"""

import json
from pathlib import Path

from advdmd.monitoring import health

ROOT = Path(__file__).parent.parent
# By steps of the student, folders of results/: scores above the teacher's or beside it; at two steps the best that was found.
CLAIMS = ("h1", "h1-one-turn", "h2", "h2-guidance-3.2", "h2-one-turn")
GOOD = {4: (*(f"{name}/*dmd*-*" for name in CLAIMS), "mini"), 2: ("h3-mini-sd35/*dmd*-*", "ablations/steps_2-*")}
BROKEN = ROOT / "results" / "broken"


def main() -> None:
    folders = {
        steps: [f for pattern in patterns for f in sorted((ROOT / "results").glob(pattern)) if f.is_dir()]
        for steps, patterns in GOOD.items()
    }
    bands = {steps: health.ranges_of_runs([health.read(f) for f in runs]) for steps, runs in folders.items() if runs}
    told = {
        "runs": {steps: [str(f.relative_to(ROOT)) for f in runs] for steps, runs in folders.items()},
        "bands": {n: {k: [float(f"{v:.4g}") for v in b] for k, b in found.items()} for n, found in bands.items()},
    }
    found, two = bands[4], bands.get(2, {})
    (ROOT / "src/advdmd/bands.json").write_text(json.dumps(told, indent=1) + "\n")
    broken = {f.name: health.diagnose(health.read(f), found) for f in sorted(BROKEN.glob("*")) if f.is_dir()}
    lines = [
        "| panel | what it means | good runs, 4 steps | 2 steps | below | above |" + "".join(f" {n} |" for n in broken),
        "|---" * (6 + len(broken)) + "|",
    ]
    for p in health.DIAGNOSTICS:
        said = [f"{b[0]:.3g} to {b[1]:.3g}" if (b := of.get(p.key)) else "not measured" for of in (found, two)]
        values = {n: next((f for f in fs if f.panel.key == p.key), None) for n, fs in broken.items()}
        cells = "".join(
            f" {'**' if v and v.remedy else ''}{f'{v.value:.3g}' if v else ''}{'**' if v and v.remedy else ''} |"
            for v in values.values()
        )
        meaning = p.meaning.replace("|", chr(92) + "|")
        lines.append(f"| `{p.key}` | {meaning} | {' | '.join(said)} | {p.low or '-'} | {p.high or '-'} |{cells}")
    page = ROOT / "docs/health.md"
    head, _, _ = page.read_text().partition("<!-- panels -->")
    page.write_text(f"{head}<!-- panels -->\n" + "\n".join(lines) + "\n")
    print(page)


if __name__ == "__main__":
    main()
