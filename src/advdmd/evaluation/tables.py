"""Summaries of evaluations as tables: one column per model."""

from collections.abc import Callable, Mapping, Sequence

from advdmd.evaluation.benchmark import PUBLISHED
from advdmd.types import Json

OWN_REWARD = " (its own training reward)"


def _cell(x: Json) -> str:
    return f"{x['mean']:.3f} [{x['interval'][0]:.3f}, {x['interval'][1]:.3f}]"


def _headline(summary: Json) -> tuple[str, str]:
    """(rule of the headline, the other one), by their keys: a published benchmark's is its own, "loose" in files."""
    return ("loose", "strict") if summary.get("suite") in PUBLISHED else ("strict", "loose")


def markdown(summaries: Mapping[str, Json]) -> str:
    """`table_cells` of summaries by name, as a table of Markdown."""
    return markdown_table(table_cells(summaries))


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, the head first, as a table of Markdown; empty without any."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n" if lines else ""


def table_cells(summaries: Mapping[str, Json]) -> list[list[str]]:
    """One column per model: the headline rule by task, the other rule, kinds, diversity, what it cost; names first.

    Raises ValueError if the columns were judged by different judges: their figures are not one row.
    """
    names, first = list(summaries), next(iter(summaries.values()))
    judges = {s.get("judge", "checker").removesuffix(OWN_REWARD) for s in summaries.values()}
    if len(judges) > 1:
        raise ValueError(f"figures of different judges ({', '.join(sorted(judges))}) are not one table")
    judge, (rule, other) = next(iter(judges)), _headline(first)
    title = first.get("suite", "") + (f"[{judge}]" if judge != "checker" else "")

    def row(label: str, cell: Callable[[Json], str]) -> list[str]:
        return [label, *(cell(summaries[n]) for n in names)]

    lines = [[f"{title} {'strict' if rule == 'strict' else 'official'}".strip(), *names]]
    if any(s.get("judge", "").endswith(OWN_REWARD) for s in summaries.values()):
        lines.append(row("**trained on this judge**", lambda s: "yes" if s["judge"].endswith(OWN_REWARD) else "no"))
    if any(s.get("images") != s.get("of", s.get("images")) for s in summaries.values()):
        lines.append(row("**how much of it**", lambda s: f"partial {s['images']}/{s['of']}"))
    if any(s.get("dropped") for s in summaries.values()):
        lines.append(row("**images left out by the official arithmetic**", lambda s: str(s.get("dropped", 0))))
    for task in first[rule]:
        label = f"**{task}**" if task == "overall" else task
        lines.append(row(label, lambda s, task=task: _cell(s[rule][task])))
    lines.append(row(f"{'official' if other == 'loose' else other}, overall", lambda s: _cell(s[other]["overall"])))
    for kind in first.get("breakdown") or {}:
        lines.append(row(kind, lambda s, kind=kind: f"{s['breakdown'].get(kind, float('nan')):.3f}"))
    if any(s.get("diversity") for s in summaries.values()):
        lines.append(
            row("diversity against the renderer", lambda s: f"{s['diversity']['mean']:.2f}" if s.get("diversity") else "-")
        )
    lines.append(row("evaluations per image", lambda s: str(s.get("nfe") or "-")))
    return lines
