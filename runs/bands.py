"""src/advdmd/bands.json and docs/health.md's table, from the kept good runs: python runs/bands.py"""

import json
from pathlib import Path

from advdmd import health

ROOT = Path(__file__).parent.parent
GOOD = ("h1", "h1-one-turn", "h2", "h2-guidance-3.2", "h2-one-turn")  # scores above the teacher's or beside it
BROKEN = ROOT / "results" / "broken"


def main() -> None:
    folders = [f for name in GOOD for f in sorted((ROOT / "results" / name).glob("*dmd*-*")) if f.is_dir()]
    folders.append(ROOT / "results" / "mini")  # the main job
    found = health.band_of([health.read(f) for f in folders])
    told = {
        "runs": [str(f.relative_to(ROOT)) for f in folders],
        "bands": {k: [float(f"{v:.4g}") for v in b] for k, b in found.items()},
    }
    (ROOT / "src/advdmd/bands.json").write_text(json.dumps(told, indent=1) + "\n")
    broken = {f.name: health.examine(health.read(f), found) for f in sorted(BROKEN.glob("*")) if f.is_dir()}
    lines = [
        "| panel | what it means | good runs | below | above |" + "".join(f" {n} |" for n in broken),
        "|---" * (5 + len(broken)) + "|",
    ]
    for p in health.PANELS:
        band = found.get(p.key)
        values = {n: next((f for f in fs if f.panel.key == p.key), None) for n, fs in broken.items()}
        cells = "".join(
            f" {'**' if v and v.remedy else ''}{f'{v.value:.3g}' if v else ''}{'**' if v and v.remedy else ''} |"
            for v in values.values()
        )
        low_high = f"{band[0]:.3g} to {band[1]:.3g}" if band else "not measured"
        lines.append(
            f"| `{p.key}` | {p.meaning.replace('|', chr(92) + '|')} | {low_high} | {p.low or '-'} | {p.high or '-'} |{cells}"
        )
    page = ROOT / "docs/health.md"
    head, _, _ = page.read_text().partition("<!-- panels -->")
    page.write_text(f"{head}<!-- panels -->\n" + "\n".join(lines) + "\n")
    print(page)


if __name__ == "__main__":
    main()
