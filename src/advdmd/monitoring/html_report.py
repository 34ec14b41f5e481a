"""Runs as one HTML page: health, recipe, curves, diagnostics with their ranges, samples over time, scores, failures."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from advdmd.distillation.validation import start_table
from advdmd.evaluation import failure_gallery, results, tables
from advdmd.evaluation.reward_knowledge import with_interval
from advdmd.files import read_object, write_text
from advdmd.monitoring import charts, health
from advdmd.monitoring.reward_hacking import reward_hacking_step
from advdmd.recipes import registry
from advdmd.recipes.overrides import diff, dump
from advdmd.recipes.recipe import Recipe
from advdmd.types import Json

GRIDS = 8  # sample grids shown of a run, evenly spread and always the last
FAILURES = 24
WIDEST = 1800  # pixels of a sample grid
COLORS = (
    ("#c0392b", "#ff7b6b"),
    ("#1f6fb2", "#6db3f2"),
    ("#1e8449", "#5fd38d"),
    ("#7d3c98", "#c58be0"),
    ("#9a6a00", "#e5b34a"),
)
STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 1.2rem }
.card h3 { font: 600 13px ui-monospace, monospace; margin: 0; overflow-wrap: anywhere }
.card p { font-size: 12px; margin: .1rem 0; opacity: .8 }
svg.chart { position: static; height: auto } .chart text { fill: currentColor; opacity: .7; stroke: none; font-size: 10px }
.chart .end { text-anchor: end } .chart .mid { text-anchor: middle } .chart .grid { stroke: var(--line); fill: none }
.chart rect.band { fill: #2e9e5b; fill-opacity: .13; stroke: none } .chart path, .chart circle { fill: none; stroke-width: 1.6 }
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 1rem }
.grids figure { width: auto } .grids .wide { grid-column: 1 / -1; max-width: 900px }
.grids img { width: 100%; image-rendering: pixelated }
.scroll { overflow-x: scroll; scrollbar-width: thin }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap }
pre { font-size: 12px; overflow-x: auto } summary { cursor: pointer } h2.part { font-size: 1.25rem; margin: 2rem 0 .6rem }
.key { display: inline-block; width: 1.2em; height: .25em; vertical-align: middle; margin-right: .4em }
"""


@dataclass(frozen=True)
class RunRecord:
    """A training run as its folder tells it."""

    label: str
    folder: Path
    name: str
    recipe: Recipe
    metrics: health.RunMetrics

    @classmethod
    def read(cls, folder: Path, label: str) -> "RunRecord":
        """Raises ValueError if it is none."""
        inner = health.run_of(folder)
        if not (inner / "recipe.yaml").is_file():
            raise ValueError(f"{folder} is not a training run: it has no recipe.yaml")
        name, r = registry.resolve(str(inner / "recipe.yaml"))
        return cls(label, inner, name, r, health.read_metrics(inner))

    @property
    def ranges(self) -> Mapping[str, health.Range]:
        return health.ranges_for(self.recipe)

    def curve(self, key: str, x: str = "step") -> charts.Curve:
        found = [(m[x], m[key]) for m in self.metrics if key in m and x in m]
        return [a for a, _ in found], [b for _, b in found]

    def grids(self) -> list[Path]:
        """Sheets of samples, or the one that is kept of a kept run."""
        every = sorted((self.folder / "samples").glob("step-*.png")) or [*self.folder.glob("samples.png")]
        n = min(GRIDS, len(every))
        return [every[round((i + 1) * len(every) / n) - 1] for i in range(n)]


def labels(folders: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart. Raises ValueError if two are the same."""
    paths = [f.resolve().parts for f in folders]
    for n in range(1, max(map(len, paths), default=1) + 1):
        found = ["/".join(p[-n:]) for p in paths]
        if len(set(found)) == len(found):
            return found
    raise ValueError(f"the same folder is named twice: {', '.join(map(str, folders))}")


def write_report(folders: Sequence[Path], scores: Sequence[Path], out: Path) -> Path:
    """The page of one or several runs; `scores` are evaluations, the first of a suite is what the others are compared to.

    Raises ValueError on a folder that is no run or no evaluation, before anything is written.
    """
    if len(folders) > len(COLORS):
        raise ValueError(f"{len(folders)} runs: at most {len(COLORS)} can be distinguished on one page")
    runs = [RunRecord.read(f, label) for f, label in zip(folders, labels(folders), strict=True)]
    found = [*scores, *(p.parent for f in folders for p in sorted(f.glob("*/scores.json"), key=_teachers_first))]
    parts = [
        _overview(runs),
        _comparisons(runs),
        _starts(runs),
        _scores(found) or _tables(folders),
        _validation(runs),
        _samples(runs),
        _panels(runs),
        _audits(runs),
        _recipes(runs),
    ]
    title = html.escape(" · ".join(r.label for r in runs))
    colors = [
        f".c{i} {{ stroke: light-dark({light}, {dark}); background: light-dark({light}, {dark}) }}"
        for i, (light, dark) in enumerate(COLORS)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, failure_gallery.html_document(title, "".join(parts), STYLE + "\n".join(colors)))
    return out


def _teachers_first(scores: Path) -> tuple[bool, int, str]:
    """The main job's evaluations in the order in which they are compared: the teacher, longest first, then the student."""
    name = scores.parent.name
    steps = [int(n) for n in re.findall(r"\d+", name)]
    return not name.startswith("teacher"), -max(steps, default=0), name


def _part(title: str, body: str) -> str:
    return f'<h2 class="part">{title}</h2>{body}' if body else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; **bold** as in Markdown."""

    def cell(tag: str, text: str) -> str:
        cell = html.escape(text.replace("**", ""))
        return f"<{tag}>{f'<b>{cell}</b>' if text.startswith('**') else cell}</{tag}>"

    lines = ["<tr>" + "".join(cell("td" if i else "th", c) for c in row) + "</tr>" for i, row in enumerate(rows)]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _key(i: int, label: str) -> str:
    return f'<span class="key c{i}"></span>{html.escape(label)}'


def _overview(runs: Sequence[RunRecord]) -> str:
    """Each run's recipe, progress and health."""
    out = []
    for i, r in enumerate(runs):
        step, summary = int(r.metrics[-1]["step"]) + 1, health.summary(r.metrics, r.recipe)
        mark = ("good" if summary == "healthy" else "bad") if r.ranges else ""
        done = f"{step} of {r.recipe.iterations} iterations, {r.recipe.forwards_until(step):,.0f} forwards a sample"
        sort = f"{html.escape(r.name)} from {html.escape(r.recipe.teacher)}, seed {r.recipe.seed}"
        out.append(f'<p><b>{_key(i, r.label)}</b>: {sort}<br>{done}<br><span class="{mark}">{html.escape(summary)}</span></p>')
    return "".join(out)


def _card(runs: Sequence[RunRecord], key: str, text: str, band: health.Range | None = None) -> str:
    """A metric of all runs by iteration; all cards have one x-axis."""
    iterations = min(r.metrics[0]["step"] for r in runs), max(r.metrics[-1]["step"] for r in runs)
    drawn = charts.line_chart([r.curve(key) for r in runs], band, html.escape(key), iterations)
    return f'<div class="card"><h3>{html.escape(key)}</h3><p>{html.escape(text)}</p>{drawn}</div>' if drawn else ""


def _validation(runs: Sequence[RunRecord]) -> str:
    """Score, diversity and reward by iteration: reward hacking shows as reward up, score down."""
    texts = {
        "eval/score": "validation score, which selects the student",
        "eval/mini-geneval": "mini-geneval of held-out noise",
        "eval/mini-dpg": "mini-dpg, prompts that training does not have",
    }
    known = {k for r in runs for m in r.metrics for k in m if k.startswith("eval/")} - {d.key for d in health.DIAGNOSTICS}
    keys = [*texts, *sorted(known - set(texts) - {"eval/forwards_per_sample"})]
    cards = [_card(runs, key, texts.get(key, "validation prompts, mean")) for key in keys]
    cards.append(_card(runs, "reward/final", "reward of the discriminator for final images"))
    hacked = [f"{r.label} after {s} iterations" for r in runs if (s := reward_hacking_step(r.metrics)) is not None]
    note = "<p>All curves are by iteration.</p>"
    note += f"<p>Reward hacking: {html.escape(', '.join(hacked))}.</p>" if hacked else ""
    return _part("Score and reward", note + f'<div class="cards">{"".join(cards)}</div>' if any(cards) else "")


def _panels(runs: Sequence[RunRecord]) -> str:
    ranges = next((r.ranges for r in runs if r.ranges), {})
    cards = []
    for p in health.DIAGNOSTICS:
        good = ranges.get(p.key)
        text = p.meaning + (f"; good runs {good[0]:.3g} to {good[1]:.3g}" if good else "")
        cards.append(_card(runs, p.key, text, good))
    known = {p.key for p in health.DIAGNOSTICS} | {"step"}
    others = sorted({k for r in runs for m in r.metrics[-50:] for k in m if k not in known and not k.startswith("eval/")})
    more = "".join(_card(runs, k, "") for k in others)
    folded = f'<details><summary>everything else that was logged</summary><div class="cards">{more}</div></details>'
    return _part("Diagnostics", f'<div class="cards">{"".join(cards)}</div>' + (folded if more else ""))


def _audits(runs: Sequence[RunRecord]) -> str:
    """What `advdmd audit` has measured of the runs that it was called on."""
    out = ""
    for i, r in enumerate(runs):
        if not (r.folder / "audit.json").is_file():
            continue
        found = read_object(r.folder / "audit.json", "reward", "agreement", "effect", hint="run advdmd audit again")
        knows = found["reward"]
        rows = [["the discriminator asked about", "correlation within a prompt", f"best of {knows['images']} by its logit"]]
        rows += [[k, with_interval(v["correlation"]), with_interval(v["best"])] for k, v in knows["levels"].items()]
        steps = [["gradient of the student", "agreement of two halves", "a step's change of the reward", "of the score"]]
        for kind, cosine in found["agreement"].items():
            effect = found["effect"].get(kind, {})
            steps.append([kind, f"{cosine:.3f}", *(with_interval(effect[k]) if effect else "-" for k in ("reward", "score"))])
        about = (
            f"after {found['iteration']} iterations, scored by {found['scorer']}: mean {knows['random']:.3f}, the best of "
            f"{knows['images']} images {knows['oracle']:.3f}"
        )
        out += f"<p>{_key(i, r.label)} {html.escape(about)}</p>{_table(rows)}{_table(steps)}"
    return _part("Audit: what the reward knows, which way gradients point", out)


def _samples(runs: Sequence[RunRecord]) -> str:
    out = []
    for i, r in enumerate(runs):
        figures = []
        for grid in r.grids():
            url, _ = failure_gallery.data_url(grid, WIDEST, exact=WIDEST)
            when = f"iteration {int(grid.stem.rpartition('-')[2])}" if "-" in grid.stem else "the last iteration"
            figures.append(f'<figure><img alt="samples, {when}" src="{url}"><figcaption>{when}</figcaption></figure>')
        if figures:
            out.append(f'<p>{_key(i, r.label)}</p><div class="grids">{"".join(figures)}</div>')
    note = "<p>The same prompts and noise every time; the EMA student.</p>"
    return _part("Samples over time", note + "".join(out) if out else "")


def _comparisons(runs: Sequence[RunRecord]) -> str:
    """The main job's picture: teacher and student on the same prompts and noise."""
    out = []
    for i, r in enumerate(runs):
        beside = next((f / "comparison.png" for f in (r.folder, r.folder.parent) if (f / "comparison.png").is_file()), None)
        if beside:
            url, _ = failure_gallery.data_url(beside, WIDEST, exact=WIDEST)
            caption = "a row each: the teacher at many steps, the teacher at few, the student; the same prompts and noise"
            picture = f'<figure class="wide"><img alt="comparison" src="{url}"><figcaption>{caption}</figcaption></figure>'
            out.append(f'<p>{_key(i, r.label)}</p><div class="grids">{picture}</div>')
    return _part("Teacher beside student", "".join(out))


def _starts(runs: Sequence[RunRecord]) -> str:
    """The scores of a few-step model that a student starts from beside the student's."""
    tables = ((i, r, start_table(r.folder, r.metrics)) for i, r in enumerate(runs))
    return _part("Start and student", "".join(f"<p>{_key(i, r.label)}</p>{_table(rows)}" for i, r, rows in tables if rows))


def _scores(found: Sequence[Path]) -> str:
    """A table a suite, paired differences to its first evaluation, failures of its last."""
    suites: dict[tuple[str, str], list[tuple[Path, Json]]] = {}
    for path in dict.fromkeys(found):
        summary, _ = results.read_scores(path)
        suites.setdefault((summary["suite"], summary["split"]), []).append((path, summary))
    out = []
    for (suite, split), mine in suites.items():
        names = labels([p for p, _ in mine])
        rows = tables.table_cells({n: s for n, (_, s) in zip(names, mine, strict=True)})
        first, differences = mine[0][0], []
        for (path, _), name in zip(mine[1:], names[1:], strict=True):
            d = results.compare([path], [first])["difference"]["strict"]["overall"]
            differences.append(f"{name} - {names[0]}: {d['mean']:+.3f} [{d['interval'][0]:+.3f}, {d['interval'][1]:+.3f}]")
        paired = f"<p>Strict, paired by prompt and noise: {html.escape('; '.join(differences))}</p>" if differences else ""
        out.append(_part(f"{html.escape(suite)}, {html.escape(split)}", _table(rows) + paired))
        columns = [
            (n, p, results.read_verdicts(p)) for n, (p, _) in zip(names, mine, strict=True) if (p / "verdicts.jsonl").is_file()
        ]
        if columns:
            shown, summary, note = failure_gallery.failure_cards(columns[::-1], FAILURES)
            out.append(f"<details><summary>{summary}</summary><p>{note}</p>{shown}</details>")
    return "".join(out)


def _tables(folders: Sequence[Path]) -> str:
    """The main job's own table, where its images are gone."""
    out = []
    for f in folders:
        if (f / "table.json").is_file():
            models = read_object(f / "table.json", "models", hint="run the main job again")["models"]
            out.append(_part(html.escape(next(iter(models.values()))["suite"]), _table(tables.table_cells(models))))
    return "".join(out)


def _recipes(runs: Sequence[RunRecord]) -> str:
    out = []
    for r in runs[1:]:
        settings = "\n".join(diff(runs[0].recipe, r.recipe)) or "the same settings"
        out.append(f"<p>{html.escape(r.label)} beside {html.escape(runs[0].label)}:</p><pre>{html.escape(settings)}</pre>")
    for r in runs:
        text = html.escape(dump(r.name, r.recipe))
        out.append(f"<details><summary>{html.escape(r.label)}: every setting</summary><pre>{text}</pre></details>")
    return _part("Recipe", "".join(out))
