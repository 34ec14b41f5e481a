"""docs/results.md, its pictures and the README's table, from the JSON files in results/: no figure there is typed by hand.

Usage: python runs/render_results.py   (needs matplotlib: pip install 'advdmd[plots]')
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from advdmd.monitoring import health
from advdmd.monitoring.reward_hacking import reward_hacking_step
from advdmd.recipes.registry import resolve

ROOT = Path(__file__).parent.parent
RESULTS, PAGE, README = ROOT / "results", ROOT / "docs" / "results.md", ROOT / "README.md"
PERFORMANCE, RELIABILITY = RESULTS / "performance", RESULTS / "reliability"
MARKS = ("<!-- results: made by runs/render_results.py -->", "<!-- /results -->")
H1 = "H1: AdvDMD at 4 steps against mini-sd35 at 40 guided steps"
H2 = "H2: AdvDMD at 4 steps against mini-sd3 at 40 guided steps, and DMD2"
SHORT, DENSE = ("mini-geneval",), ("mini-dpg",)
H3 = "H3: AdvDMD at {} against TwinFlow and DMD2 at {}, mini-qwen"
CLAIMS = {
    "h1": (H1, DENSE, ("teacher",)),
    "h2": (H2, SHORT, ("teacher", "dmd2")),
    "h3": (H3.format("2 steps", "2"), SHORT + DENSE, ("twinflow", "dmd2")),
    "h3-4-step": (H3.format("4 steps", "4") + ", of earlier code", SHORT + DENSE, ("twinflow", "dmd2")),
}
LABELS = {
    "advdmd": "AdvDMD",
    "twinflow": "TwinFlow",
    "dmd2": "DMD2",
    "dmd2_paper": "DMD2, its paper's schedule",
    "dmd": "DMD alone",
    "no_policy": "AdvDMD without policy updates",
    "teacher": "teacher",
    "base": "the student they start from",
    "forward": "with policy updates on the forward process",
    "none": "without policy updates",
    "checker": "with the exact checker as the reward",
}
ARMS = ("forward", "none", "checker", "base")  # of runs/reinforce.sh
COLORS = {
    "advdmd": "tab:red",
    "twinflow": "tab:green",
    "dmd2": "tab:blue",
    "dmd2_paper": "tab:cyan",
    "dmd": "tab:gray",
    "no_policy": "tab:orange",
    "base": "tab:gray",
    "forward": "tab:red",
    "none": "tab:blue",
    "checker": "tab:green",
}
ABLATIONS = {"ablations": "Ablations"}
IN_README = ("h1", "h2", "h3", "h3-4-step")  # at most twelve rows
Found = tuple[str, str, dict[str, Any]]  # ours, theirs, comparison


def signed(d: dict[str, Any]) -> str:
    return f"{d['mean']:+.3f} [{d['interval'][0]:+.3f}, {d['interval'][1]:+.3f}]"


def comparisons(folder: Path) -> list[Found]:
    """Every comparison of a claim."""
    file = folder / "comparisons.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    return [(*name.split("-")[-2:], c) for name, c in sorted(found.items())]


def is_about(found: Found, suite: str, theirs: str, split: str = "test") -> bool:
    return (found[0], found[1], found[2]["suite"], found[2]["split"]) == ("advdmd", theirs, suite, split)


def verdict(found: dict[str, Any], suite: str, theirs: str) -> str:
    d = found["difference"]["strict"]["overall"]
    low, high = d["interval"]
    word = "holds" if low > 0 else "does not hold" if high < 0 else "is open: the interval contains 0"
    n = len(found["ours"]["strict"])
    short = "" if n >= 3 else f" Only {n} training seed{'s' * (n > 1)} so far."
    return f"Against {LABELS[theirs]} on {suite} the claim **{word}**: {signed(d)}, {d['against']:.3f} there.{short}"


def table(rows: list[Found]) -> str:
    out = [
        "| suite, split | ours | against | strict, each seed | mean | theirs | paired difference, strict "
        "| the same, official rule | diversity |"
    ]
    out.append("|---" * 9 + "|")
    for ours, theirs, c in rows:
        a, d = c["ours"], c["difference"]
        share = f"{a['diversity']:.2f} / {c['theirs']['diversity']:.2f}" if a["diversity"] else "-"
        seeds = ", ".join(f"{s:.3f}" for s in a["strict"])
        means = f"{np.mean(a['strict']):.3f} | {np.mean(c['theirs']['strict']):.3f}"
        out.append(
            f"| {c['suite']}, {c['split']} | {LABELS[ours]} | {LABELS[theirs]} | {seeds} | {means} "
            f"| {signed(d['strict']['overall'])} | {signed(d['loose']['overall'])} | {share} |"
        )
    return "\n".join(out)


def tasks(rows: list[Found]) -> str:
    """Paired difference of AdvDMD to its teacher on mini-geneval, task by task."""
    found = [c for row in rows if is_about(row, "mini-geneval", "teacher") for c in [row[2]]]
    if not found:
        return ""
    lines = [f"| {t} | {v['against']:.3f} | {signed(v)} |" for t, v in found[0]["difference"]["strict"].items()]
    return "\n".join(["| task of mini-geneval | teacher | AdvDMD - teacher, strict |", "|---|---|---|", *lines])


def grid(head: str, rows: Iterable[Sequence[object]]) -> list[str]:
    """A table's lines: `head` names its columns, with bars between them."""
    rule = "|---" * (head.replace("\\|", "").count("|") + 1) + "|"
    return [f"| {head} |", rule, *(f"| {' | '.join(map(str, r))} |" for r in rows)]


def ablations(folder: Path) -> str:
    """One row per change to the recipe: what it scores, and how far that is from the recipe itself."""
    lines = ["| change | mini-geneval | - recipe | diversity | mini-dpg | - recipe |", "|---" * 6 + "|"]
    table = json.loads((folder / "comparisons.json").read_text())
    names = sorted({key.removeprefix("mini-geneval-").removeprefix("mini-dpg-") for key in table})
    for name in sorted(names, key=lambda n: n != "recipe"):
        found = [table[key] for suite in ("mini-geneval", "mini-dpg") if (key := f"{suite}-{name}") in table]
        if len(found) < 2:
            continue  # the run is not over
        cells = [f"{np.mean(c['ours']['strict']):.3f}" for c in found]
        gaps = ["" if name == "recipe" else signed(c["difference"]["strict"]["overall"]) for c in found]
        diversity = f"{found[0]['ours']['diversity']:.2f}"
        lines.append(f"| {name.replace('_', ' ')} | {cells[0]} | {gaps[0]} | {diversity} | {cells[1]} | {gaps[1]} |")
    return "\n".join(lines)


def runs_of(folder: Path) -> dict[str, health.RunMetrics]:
    """Run name (METHOD-SEED) -> its metrics."""
    return {f.parent.name: health.read_metrics(f.parent) for f in sorted(folder.glob("*/metrics.jsonl"))}


def smooth(values: list[float], width: int = 9) -> np.ndarray:
    width = min(width, len(values) // 2 * 2 - 1)
    return (
        np.convolve(np.pad(values, width // 2, mode="edge"), np.ones(width) / width, "valid") if width > 1 else np.array(values)
    )


def reward(metrics: health.RunMetrics, steps: list[int], F: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    rewarded = [(m["step"], m["reward/final"]) for m in metrics if "reward/final" in m]
    return (np.interp([s for s, _ in rewarded], steps, F), smooth([r for _, r in rewarded])) if len(rewarded) > 2 else None


def curves(folder: Path, runs: dict[str, health.RunMetrics]) -> None:
    """Held-out score and diversity of every run against forwards; and one panel a run with score, diversity and reward."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # pyright: ignore[reportMissingImports]

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    columns = min(3, len(runs))
    panels, grid = plt.subplots(-(-len(runs) // columns), columns, figsize=(3.6 * columns, 2.4 * -(-len(runs) // columns)))
    for (name, metrics), ax in zip(runs.items(), np.atleast_1d(grid).flat, strict=False):
        method, _, seed = name.rpartition("-")
        validated = [m for m in metrics if "eval/score" in m]
        F, steps = np.array([m["eval/forwards_per_sample"] for m in validated]), [int(m["step"]) for m in validated]
        score, diversity = ([m[f"eval/{k}"] for m in validated] for k in ("score", "diversity"))
        label = LABELS[method] if seed == "0" else None
        axes[0].plot(F, score, color=COLORS[method], label=label)
        axes[1].plot(F, diversity, color=COLORS[method])
        ax.plot(F, score, color="tab:red", label="score")
        ax.plot(F, diversity, color="tab:green", label="diversity")
        ax.set(title=f"{LABELS[method]}, seed {seed}", ylim=(0, 1.1))
        if found := reward(metrics, steps, F):
            other = ax.twinx()
            other.plot(*found, color="tab:purple", alpha=0.6)
            other.tick_params(labelsize=7, colors="tab:purple")
            ax.plot([], [], color="tab:purple", alpha=0.6, label="discriminator's reward (right)")
        ax.tick_params(labelsize=7)
    for ax in np.atleast_1d(grid).flat[len(runs) :]:
        ax.set_visible(False)
    np.atleast_1d(grid).flat[0].legend(frameon=False, fontsize=7)
    for ax, title in zip(axes, ("validation score", "diversity against the renderer"), strict=True):
        ax.set(title=title, xlabel="forwards per sample")
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    fig.savefig(folder / "curves.png", dpi=90)
    panels.tight_layout()
    panels.savefig(folder / "runs.png", dpi=80)
    plt.close("all")


def samples_curve(folder: Path, runs: dict[str, health.RunMetrics]) -> None:
    """Held-out score against the samples that policy updates have used; without policy updates, against as many iterations."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # pyright: ignore[reportMissingImports]

    fig, ax = plt.subplots(figsize=(5, 3), constrained_layout=True)
    for name, metrics in runs.items():
        method, _, seed = name.rpartition("-")
        _, r = resolve(str(folder / name / "recipe.yaml"))
        algorithm: Any = r.algorithm
        validated = [m for m in metrics if "eval/score" in m]
        used = [max(0.0, m["step"] + 1 - algorithm.warmup_iterations) * r.batch for m in validated]
        ax.plot(used, [m["eval/score"] for m in validated], color=COLORS[method], label=LABELS[method] if seed == "0" else None)
    ax.set(xlabel="samples after the warm-up", ylabel="validation score")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=7)
    fig.savefig(folder / "score_by_samples.png", dpi=90)
    plt.close("all")


def hacking(runs: dict[str, health.RunMetrics]) -> str:
    """In how many runs with rewards the reward rose while the score fell."""
    rewarded = {name: metrics for name, metrics in runs.items() if any("reward/final" in m for m in metrics)}
    found = {name: step for name, metrics in rewarded.items() if (step := reward_hacking_step(metrics)) is not None}
    where = "; ".join(f"{name} after {step} iterations" for name, step in found.items())
    first = [next(int(m["step"]) for m in metrics if "reward/final" in m) for metrics in rewarded.values()]
    n = sum("eval/score" in m and m["step"] >= f for f, metrics in zip(first, rewarded.values(), strict=True) for m in metrics)
    return (
        f"Reward hacking was found in {len(found)} of {len(rewarded)} runs, by {n} validations{': ' + where if where else ''}."
    )


def claim(name: str) -> list[str]:
    """A claim's section, or nothing if it has no results."""
    folder, (title, suites, _) = RESULTS / "claims" / name, CLAIMS[name]
    rows = comparisons(folder) if folder.is_dir() else []
    if not rows:
        return []
    runs = runs_of(folder)
    curves(folder, runs)
    at = " and ".join(sorted({row[2]["commit"] for row in rows}))
    lines = ["", f"## {title}", "", f"`runs/{name[:2]}.sh` at commit {at}.", ""]
    for theirs in LABELS:
        found = ((row[2], suite) for row in rows for suite in suites if is_about(row, suite, theirs))
        lines += [f"- {verdict(c, suite, theirs)}" for c, suite in found]
    diversity = {
        about: row[2]["ours"]["diversity"] / row[2]["theirs"]["diversity"]
        for about in ("mini-geneval", "mini-dpg")
        for row in rows
        if is_about(row, about, "teacher")
    }
    if diversity:
        text = ", ".join(f"{share:.1%} on {about}" for about, share in diversity.items())
        lines += [f"- Diversity beside the teacher's (at least 90 % is the aim): {text}."]
    lines += [f"- {hacking(runs)}", "", table(rows), "", tasks(rows), ""]
    lines += [f"![score and diversity against forwards](../results/claims/{name}/curves.png)", ""]
    return [*lines, f"![score, diversity and reward of each run](../results/claims/{name}/runs.png)"]


def reinforcement(folder: Path) -> list[str]:
    """The section of runs/reinforce.sh: what each way on from a student scores, and its differences to others."""
    if not (folder / "comparisons.json").is_file():
        return []
    runs = {k: v for k, v in runs_of(folder).items() if not k.startswith("base")}
    curves(folder, runs)
    samples_curve(folder, runs)
    (folder / "runs.png").unlink()
    rows, scores = [], [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    for ours, theirs, c in comparisons(folder):
        suite = c["suite"]
        both = [f"{np.mean(c[side]['strict']):.3f}" for side in ("ours", "theirs")]
        diversity = [f"{c[side]['diversity']:.2f}" for side in ("ours", "theirs")]
        difference = signed(c["difference"]["strict"]["overall"])
        rows.append((ARMS.index(ours), suite, LABELS[ours], LABELS[theirs], *both, difference, " / ".join(diversity)))
    head = "suite | a student goes on | compared with | score | the other's | paired difference, strict | diversity"
    table = [row[1:] for row in sorted(rows)]
    seeds = {arm: len({s["run"] for s in scores if s["run"].startswith(f"{arm}-")}) for arm in ARMS}
    name = re.fullmatch(r"reinforce-(.+?)(?:-(\d+))?", folder.name)
    assert name
    teacher, iterations = name.groups()
    title, call = (f", {iterations} iterations", f"ITERATIONS={iterations} ") if iterations else ("", "")
    return [
        *("", f"## What policy updates are worth: {teacher}{title}", ""),
        f"`TEACHER={teacher} {call}runs/reinforce.sh`: a student of {teacher} that has had no policy updates goes on from the "
        "same weights with the same forwards, with policy updates or without. Seeds: "
        + ", ".join(f"{n} {LABELS[arm]}" for arm, n in seeds.items() if n)
        + ".",
        *("", *grid(head, table), ""),
        f"![score and diversity against forwards](../results/{folder.name}/curves.png)",
        "",
        f"![score against samples](../results/{folder.name}/score_by_samples.png)",
        *(["", (folder / "reading.md").read_text().strip()] if (folder / "reading.md").is_file() else []),
    ]


def summary() -> str:
    """The README's table: one row per claim and opponent."""
    out = ["| claim | suite | teacher or baseline | AdvDMD | paired difference, strict | seeds |", "|---" * 6 + "|"]
    for name in IN_README:
        _, suites, against = CLAIMS[name]
        for ours, theirs, c in comparisons(RESULTS / "claims" / name):
            suite = c["suite"]
            if suite in suites and is_about((ours, theirs, c), suite, theirs) and theirs in against:
                d, n = c["difference"]["strict"]["overall"], len(c["ours"]["strict"])
                label = name[:2].upper() + name[2:].replace("-", " ")
                scores = f"{LABELS[theirs]} {d['against']:.3f} | {np.mean(c['ours']['strict']):.3f}"
                out.append(f"| {label} | {suite} | {scores} | {signed(d)} | {n} |")
    for ours, theirs, c in comparisons(RESULTS / "reinforce-mini-sd35"):  # H1's teacher, of a student that went on
        if (ours, theirs) == ("forward", "teacher"):
            d, n = c["difference"]["strict"]["overall"], len(c["ours"]["strict"])
            scores = f"teacher {d['against']:.3f} | {np.mean(c['ours']['strict']):.3f}"
            out.insert(3, f"| H1, reinforced | {c['suite']} | {scores} | {signed(d)} | {n} |")
    return "\n".join(out)


def between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Put text between two marks of a page."""
    old = page.read_text()
    head, tail = old.index(marks[0]) + len(marks[0]), old.index(marks[1])
    page.write_text(f"{old[:head]}\n{text}\n{old[tail:]}")


def reliability() -> None:
    """What kills, low precision and hostile cases came to."""
    page = RESULTS.parent / "docs/reliability.md"
    if (file := RELIABILITY / "kills.json").is_file():
        stored = json.loads(file.read_text())
        keys = ("verb", "kills", "too late", "results", "files each")
        rows = [[*(r[k] for k in keys), len(r["different"]), r["left behind"]] for r in stored["rows"]]
        lines = grid("verb | kills in time | too late | results compared | files each | differ | left behind", rows)
        text = f"Seed {stored['seed']}, at commit {stored['commit']}."
        if (ranks := RELIABILITY / "kills-2-ranks.json").is_file():
            (r,) = json.loads(ranks.read_text())["rows"]
            text += (
                f" Two processes: {r['kills']} times one of them was killed in time. {r['results']} results were compared with"
            )
            text += f" those of one process: weights differ by {r['largest difference']:.1g} at most (2e-4 is allowed)."
            text += f" {r['others ended of themselves']} times the other process ended by itself. The remaining times it still"
            text += " waited a minute later, where torchrun ends it at once."
        between(page, ("<!-- kills -->", "<!-- /kills -->"), "\n".join([*lines, "", text]))
    if (file := RELIABILITY / "two_nodes.json").is_file():
        r = json.loads(file.read_text())
        killed, starts, apart = (r[k] for k in list(r)[3:5] + list(r)[6:])
        text = (
            f"The second node's processes were killed after the checkpoint at {killed} of {r['iterations']} iterations. The "
            f"agents started {starts[0]} and {starts[1]} times. Every iteration was logged once. Weights differ from those of "
            f"one process by {apart:.1g} at most."
        )
        between(page, ("<!-- nodes -->", "<!-- /nodes -->"), text)
    if (file := RELIABILITY / "drift.json").is_file():
        stored = json.loads(file.read_text())
        rows = [
            [name, f"{r['max']:.1e}", f"{r['outside_clip_range']:.0%}", "yes" if r["stopped"] else "no"]
            for name, r in stored["rows"].items()
        ]
        lines = grid("trajectory and replay | largest \\|ratio - 1\\| | outside the clip range | stopped", rows)
        between(page, ("<!-- drift -->", "<!-- /drift -->"), "\n".join(lines))
    if (file := RELIABILITY / "fuzz.json").is_file():
        stored = json.loads(file.read_text())
        keys = ("fine", "refused", "slow", "finding")
        rows = [[kind, *(r.get(k, 0) for k in keys)] for kind, r in stored["rows"].items()]
        lines = grid("what | results | clear errors | slow | findings", rows)
        text = f"{stored['cases']:,} cases, seed {stored['seed']}, at commit {stored['commit']}."
        between(page, ("<!-- fuzz -->", "<!-- /fuzz -->"), "\n".join([*lines, "", text]))
    if (file := RELIABILITY / "wheel.json").is_file():
        stored = json.loads(file.read_text())
        others = ", ".join(stored["other_than_pinned"]) or "none"
        text = f"At commit {stored['commit']}: {stored['wheel']}, {stored['megabytes']} MB; of {stored['packages']} packages"
        text += f" {others} had another version than its pin; {', '.join(stored['ran'])} ran."
        between(page, ("<!-- wheel -->", "<!-- /wheel -->"), text)
    if (file := RELIABILITY / "soak.json").is_file():
        stored = json.loads(file.read_text())
        names = {"resident_mb": "resident memory, MB", "open_files": "open files", "eta": "efficiency"}
        rows = [[label, *(f"{stored[k][v]:.4g}" for v in ("first", "last", "per_1000"))] for k, label in names.items()]
        lines = grid("what | after the first tenth | at the end | slope per 1,000 iterations", rows)
        m = stored["metrics"]
        text = f"{stored['iterations']:,} iterations; {m['lines']:,} lines of metrics, {m['bytes'] / 1e6:.1f} MB;"
        text += f" {stored['checkpoints_kept']} checkpoints kept."
        between(page, ("<!-- soak -->", "<!-- /soak -->"), "\n".join([*lines, "", text]))


def performance() -> None:
    """What iterations cost, and how that grows."""
    page = RESULTS.parent / "docs/performance.md"
    if (file := PERFORMANCE / "iteration.json").is_file():
        stored = json.loads(file.read_text())
        rows = [[r["recipe"], f"{r['counted']:g}", f"{r['measured']:g}", f"{r['eta']:.2f}"] for r in stored]
        lines = grid("what | counted F | measured F | efficiency", rows)
        between(page, ("<!-- iteration -->", "<!-- /iteration -->"), "\n".join(lines))
    if (file := PERFORMANCE / "scaling.json").is_file():
        stored = json.loads(file.read_text())
        two = stored.pop("two processes beside one")
        cells = [(axis, v, c) for axis, values in stored.items() for v, c in values.items()]
        rows = [[axis, v, f"{c['time']:.2f}", f"{c['forwards']:.2f}"] for axis, v, c in cells]
        lines = grid("axis | value | time of a sample | its forwards", rows)
        text = "Iterations per second of two processes with one thread each, on the same batch, as a multiple of one process: "
        text += f"{two['replicas']:.2f} as replicas, {two['spread']:.2f} with FSDP, which gathers a block for each pass."
        lines += ["", "![time of a sample](../results/performance/scaling.png)", "", text]
        between(page, ("<!-- scaling -->", "<!-- /scaling -->"), "\n".join(lines))
        scaling(stored)
    if (file := PERFORMANCE / "card.json").is_file():
        card(page, json.loads(file.read_text()))
    if (file := PERFORMANCE / "card_h100.json").is_file():
        stored = json.loads(file.read_text())
        keys = ("case", "predicted_gb", "peak_gb", "standing_gb", "seconds")
        rows = [[*(r[k] for k in keys), f"{r['forward_share']:.0%}", f"{r['share']:.0%}"] for r in stored["size"]]
        rows = [[name.replace("@", ", "), *cells] for name, *cells in rows]
        head = "preset, pixels | estimated GB | peak GB | resident GB | seconds | rate of a forward | of an iteration"
        between(
            page, ("<!-- h100 -->", "<!-- /h100 -->"), "\n".join(grid(head, [[r[0].replace("@", ", "), *r[1:]] for r in rows]))
        )


def card(page: Path, stored: dict[str, Any]) -> None:
    """What benchmarks/card.py found: true sizes, also with earlier code ("size before"), and runs beside the CPU's."""
    before, now = ({r["case"]: r for r in stored.get(k, []) if "failed" not in r} for k in ("size before", "size"))
    rows = []
    for case, r in sorted((before | now).items()):
        memory = [f"{r[k]:g}" for k in ("predicted_gb", "peak_gb", "standing_gb")]
        earlier = [f"{before[case]['seconds']:.1f}" if case in before and case in now else ""]
        name = case.replace("@", ", ") + ("" if case in now else " (earlier code)")
        rows.append([name, *memory, f"{r['seconds']:.1f}", *earlier, f"{r['forward_share']:.0%}", f"{r['share']:.0%}"])
    head = (
        "preset, pixels | estimated GB | peak GB | resident GB | seconds | seconds before | rate of a forward | of an iteration"
    )
    between(page, ("<!-- card -->", "<!-- /card -->"), "\n".join(grid(head, rows)))
    columns = ("moved", "cpu and card", "run and again", "resumed")
    same = {k: v for k, v in stored.get("same", {}).items() if k != "failed"}
    rows = [[k, *("" if v[c] is None else f"{v[c]:.2g}" for c in columns)] for k, v in same.items()]
    head = "recipe, 6 iterations | change from the teacher | GPU against CPU | repeated | stopped and resumed"
    between(page, ("<!-- same -->", "<!-- /same -->"), "\n".join(grid(head, rows)))


def scaling(stored: dict[str, dict[str, dict[str, float]]]) -> None:
    """Time and forwards of a sample along each axis."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # pyright: ignore[reportMissingImports]

    fig, axes = plt.subplots(1, len(stored), figsize=(11, 2.6), constrained_layout=True)
    for (name, values), ax in zip(stored.items(), axes, strict=True):
        for what, style in (("time", "o-"), ("forwards", "s--")):
            ax.plot(list(values), [c[what] for c in values.values()], style, label=what)
        ax.set(xlabel=name, ylim=(0, 1.1 * max(n for c in values.values() for n in c.values())))
        ax.grid(alpha=0.3)
    axes[0].set(ylabel="of a sample, main job = 1")
    axes[0].legend(frameon=False, fontsize=8)
    fig.savefig(PERFORMANCE / "scaling.png", dpi=90)
    plt.close(fig)


def main() -> None:
    lines = [
        "# Results",
        "",
        "`runs/render_results.py` makes this page from `results/`. Every figure is measured in the miniature.",
        "",
        "- All methods of a claim get the same budget of forwards.",
        "- A student makes one network evaluation per step. A teacher makes 80 per image.",
        "- Differences are paired by prompt and noise. Intervals are 95 %, over prompts and training seeds.",
        "- Diversity is the spread of what a prompt leaves open, as a share of the renderer's: ours / theirs.",
        "- The split `pairs` has shapes in colours that training never combined.",
        "",
        "H1, H2 and H3 are defined in the [README](https://github.com/advdmd/advdmd#readme).",
    ]
    for name in CLAIMS:
        lines += claim(name)
    for folder in sorted(RESULTS.glob("reinforce-*")):
        lines += reinforcement(folder)
    for folder, title in ABLATIONS.items():
        if (RESULTS / folder / "comparisons.json").is_file():
            text = (
                "`runs/ablations.sh` changes the main job's recipe in one place, as it was when its discriminator saw every "
                "sample with its whole trunk. Forwards are equal, scores are strict."
            )
            lines += ["", f"## {title}", "", text, "", ablations(RESULTS / folder), ""]
            reading = RESULTS / folder / "reading.md"
            lines += [reading.read_text().strip()] if reading.is_file() else []
    PAGE.write_text("\n".join(lines) + "\n")
    between(README, MARKS, summary())
    reliability()
    performance()
    print(PAGE)


if __name__ == "__main__":
    main()
