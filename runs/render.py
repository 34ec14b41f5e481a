"""docs/results.md and the pictures in it, from the JSON files in results/: no figure there is typed by hand.

Usage: python runs/render.py   (needs matplotlib: pip install 'advdmd[plots]')
"""

import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "results", ROOT / "docs" / "results.md"
CLAIMS = {
    "h1": ("H1: AdvDMD at 4 steps against mini-sd35 at 40 guided steps", "mini-dpg"),
    "h2": ("H2: AdvDMD at 4 steps against mini-sd3 at 40 guided steps, and against DMD2", "mini-geneval"),
}
LABELS = {"advdmd": "AdvDMD", "dmd2": "DMD2", "dmd": "DMD alone", "teacher": "teacher"}


def signed(d: dict) -> str:
    return f"{d['mean']:+.3f} [{d['interval'][0]:+.3f}, {d['interval'][1]:+.3f}]"


def comparisons(folder: Path) -> list[tuple[str, str, dict]]:
    """(ours, theirs, comparison) of every JSON file in a claim's folder."""
    return [(*f.stem.split("-")[-2:], json.loads(f.read_text())) for f in sorted(folder.glob("*.json"))]


def verdict(found: dict, suite: str, theirs: str) -> str:
    d = found["difference"]["strict"]["overall"]
    low, high = d["interval"]
    word = "holds" if low > 0 else "does not hold" if high < 0 else "is open: the interval contains 0"
    return f"Against {LABELS[theirs]} on {suite} the claim **{word}**: {signed(d)}."


def table(rows: list[tuple[str, str, dict]]) -> str:
    out = [
        "| suite, split | ours | against | strict, each seed | mean | theirs | paired difference, strict | loose | diversity |",
        "|---" * 9 + "|",
    ]
    for ours, theirs, c in rows:
        a, d = c["ours"], c["difference"]
        share = f"{a['diversity']:.2f} / {c['theirs']['diversity']:.2f}" if a["diversity"] else "-"
        out.append(
            f"| {c['suite']}, {c['split']} | {LABELS[ours]} | {LABELS[theirs]} | {', '.join(f'{s:.3f}' for s in a['strict'])} "
            f"| {np.mean(a['strict']):.3f} | {np.mean(c['theirs']['strict']):.3f} | {signed(d['strict']['overall'])} "
            f"| {signed(d['loose']['overall'])} | {share} |"
        )
    return "\n".join(out)


def tasks(rows: list[tuple[str, str, dict]], suite: str) -> str:
    """Paired difference of AdvDMD to its teacher, task by task."""
    found = [c for ours, theirs, c in rows if (ours, theirs, c["suite"]) == ("advdmd", "teacher", suite)]
    if not found or len(found[0]["difference"]["strict"]) < 3:
        return ""
    d = found[0]["difference"]["strict"]
    lines = [f"| {t} | {v['against']:.3f} | {signed(v)} |" for t, v in d.items()]
    return "\n".join(["| task | teacher | AdvDMD - teacher, strict |", "|---|---|---|", *lines])


def ablations(folder: Path) -> str:
    """One row per change to the recipe: what it scores, and how far that is from the recipe itself."""
    lines = ["| change | mini-geneval | - recipe | diversity | mini-dpg | - recipe |", "|---" * 6 + "|"]
    suites = ("mini-geneval", "mini-dpg")
    for file in sorted(folder.glob(f"{suites[0]}-*.json"), key=lambda f: "recipe" not in f.stem):
        name = file.stem.removeprefix(f"{suites[0]}-")
        files = [folder / f"{suite}-{name}.json" for suite in suites]
        if not all(f.is_file() for f in files):
            continue  # the run is not over
        found = [json.loads(f.read_text()) for f in files]
        cells = [f"{np.mean(c['ours']['strict']):.3f}" for c in found]
        gaps = ["" if name == "recipe" else signed(c["difference"]["strict"]["overall"]) for c in found]
        spread = f"{found[0]['ours']['diversity']:.2f}"
        lines.append(f"| {name.replace('_', ' ')} | {cells[0]} | {gaps[0]} | {spread} | {cells[1]} | {gaps[1]} |")
    return "\n".join(lines)


def plot(folder: Path, path: Path) -> None:
    """Held-out score, diversity and the critic's reward of every run, against forwards per sample."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(11, 3.2), constrained_layout=True)
    colors = {"advdmd": "tab:red", "dmd2": "tab:blue", "dmd": "tab:gray"}
    for run in sorted(p for p in folder.iterdir() if (p / "metrics.jsonl").is_file()):
        method, _, seed = run.name.rpartition("-")
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        sat = [m for m in steps if "exam/strict" in m]
        F = np.array([m["exam/forwards"] for m in sat])
        how = {"color": colors[method], "label": LABELS[method] if seed == "0" else None}
        axes[0].plot(F, [m["exam/strict"] for m in sat], **how)
        axes[1].plot(F, [m["exam/diversity"] for m in sat], **how)
        paid = [(m["step"], m["reward/end"]) for m in steps if "reward/end" in m]
        if paid:
            at = np.interp([s for s, _ in paid], [m["step"] for m in sat], F)
            axes[2].plot(at, np.convolve(np.pad([r for _, r in paid], 10, mode="edge"), np.ones(21) / 21, "valid"), **how)
    for ax, title in zip(
        axes, ("held-out score, strict", "diversity against the renderer", "critic's reward, final image"), strict=True
    ):
        ax.set(title=title, xlabel="forwards per sample")
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    fig.savefig(path, dpi=90)
    plt.close(fig)


def main() -> None:
    lines = [
        "# Results",
        "",
        "Made by `runs/render.py` from `results/`; every figure is measured in the miniature. Differences are paired by prompt",
        "and noise; intervals are 95 %, over prompts and training seeds. Students take 4 evaluations an image, teachers 80.",
        "Diversity: spread of what prompts leave open against the renderer's, ours / theirs. Methods had equal forwards.",
    ]
    for name, (title, suite) in CLAIMS.items():
        rows = comparisons(RESULTS / name) if (RESULTS / name).is_dir() else []
        if not rows:
            continue
        commit = rows[0][2]["commit"]
        lines += ["", f"## {title}", "", f"`runs/{name}.sh` at commit {commit}.", ""]
        for ours, theirs, c in rows:
            if ours == "advdmd" and (c["suite"], c["split"]) == (suite, "test"):
                lines += [f"- {verdict(c, suite, theirs)}"]
        lines += ["", table(rows), "", tasks(rows, "mini-geneval"), ""]
        plot(RESULTS / name, RESULTS / name / "curves.png")
        lines += [f"![scores, diversity and reward against forwards](../results/{name}/curves.png)"]
    if any((RESULTS / "ablations").glob("*.json")):
        rows = ablations(RESULTS / "ablations")
        lines += [
            "",
            "## Ablations",
            "",
            "`runs/ablations.sh`: the main job's recipe with one change, equal forwards, strict.",
            "",
            rows,
        ]
    PAGE.write_text("\n".join(lines) + "\n")
    print(PAGE)


if __name__ == "__main__":
    main()
