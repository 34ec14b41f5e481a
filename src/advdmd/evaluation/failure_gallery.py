"""Failures as one HTML page: each image with what was seen in it, the prompt, the reason; two models side by side."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from advdmd.evaluation.benchmark import SuiteItem
from advdmd.evaluation.generate import image_path
from advdmd.types import Json

Column = tuple[str, Path, Sequence[Json]]  # label, folder of images, rows
SIDE = 256  # pixels an image is shown at
STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent) }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 72rem; padding: 0 1rem }
article { border-top: 1px solid var(--line); padding: 1rem 0 } .row { display: flex; flex-wrap: wrap; gap: 1.5rem }
figure { margin: 0; width: 256px } .picture { position: relative; width: 256px; line-height: 0 }
.picture img { width: 100%; image-rendering: pixelated } svg { position: absolute; inset: 0; width: 100%; height: 100% }
rect { fill: none; stroke: #e0218a; stroke-width: 2; vector-effect: non-scaling-stroke }
text { font: 11px system-ui; fill: #e0218a; paint-order: stroke; stroke: #fff; stroke-width: 3px }
figcaption { white-space: pre-line; font-size: 13px; overflow-wrap: anywhere } .bad { color: light-dark(#c0392b, #ff7b6b) }
.good { color: light-dark(#1e8449, #5fd38d) }
h2 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere } small { opacity: .65 }
"""


def data_url(path: Path, side: int = 2 * SIDE, exact: int = 64) -> tuple[str, tuple[int, int]]:
    """A picture as a data URL, no larger than `side`, and its size; exactly as it is up to `exact` pixels."""
    with Image.open(path) as image:
        size, shown = image.size, image.convert("RGB")
    if max(size) > side:
        shown.thumbnail((side, side))
    data = io.BytesIO()
    kind = "png" if max(size) <= exact else "jpeg"
    shown.save(data, kind, quality=85, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}", size


def _boxes(details: Json, size: tuple[int, int]) -> str:
    """What was detected, drawn over the picture."""
    scale, out = SIDE / size[0], []
    for o in details.get("objects", []):
        left, top, right, bottom = (v * scale for v in o["box"])
        name = " ".join(str(o[k]) for k in ("color", "label") if o.get(k)) or "?"
        out.append(f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"/>')
        out.append(f'<text x="{left:.1f}" y="{max(10.0, top - 2):.1f}">{html.escape(name)} {o["confidence"]:.2f}</text>')
    return f'<svg viewBox="0 0 {SIDE} {SIDE * size[1] / size[0]:.0f}">{"".join(out)}</svg>'


def _figure(label: str, folder: Path, row: Json) -> str:
    item = SuiteItem(row["item"], row["prompt"], row["task"], {}, 1)
    url, size = data_url(image_path(folder, item, row["k"]))
    mark = "good" if row["strict"] == 1 else "bad"
    verdict = f"{row['loose']:.2f}, strict {row['strict']:.2f}"
    picture = f'<div class="picture"><img alt="" src="{url}">{_boxes(row["details"], size)}</div>'
    reason = f"<br>{html.escape(row['reason'])}" if row["reason"] else ""
    caption = f'<b>{html.escape(label)}</b> <span class="{mark}">{verdict}</span>{reason}'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def failure_cards(columns: Sequence[Column], limit: int) -> tuple[str, str, str]:
    """The images of the first column that fail the strict rule, spread over the tasks, the other columns' images of the same
    prompts and seeds beside them; how many there are; and how many are shown, if not all."""
    label, _, rows = columns[0]
    failed = [r for r in rows if r["strict"] < 1]
    by_task: dict[str, list[Json]] = {}
    for r in failed:
        by_task.setdefault(r["task"], []).append(r)
    share = max(1, limit // max(1, len(by_task)))
    shown = [r for mine in by_task.values() for r in mine[:share]]
    others = [(name, folder, {(r["item"], r["k"]): r for r in found}) for name, folder, found in columns[1:]]
    out = []
    for r in shown:
        figures = [_figure(label, columns[0][1], r)]
        figures += [
            _figure(name, folder, found[r["item"], r["k"]]) for name, folder, found in others if (r["item"], r["k"]) in found
        ]
        head = (
            f"<h2>{html.escape(r['prompt'])} <small>{html.escape(r['task'])} · {html.escape(r['item'])}/{r['k']}</small></h2>"
        )
        out.append(f'<article>{head}<div class="row">{"".join(figures)}</div></article>')
    kwargs = f"{html.escape(label)}: {len(failed)} of {len(rows)} images fail the strict rule"
    note = f"{len(shown)} of them are shown, at most {share} a task." if len(shown) < len(failed) else ""
    return "".join(out), kwargs, note


def html_document(title: str, body: str, style: str = "") -> str:
    """A whole page that needs nothing from anywhere."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}{style}</style><h1>{title}</h1>{body}</html>\n"
    )


def failure_page(columns: Sequence[Column], limit: int = 120) -> str:
    """Self-contained HTML of a model's failures."""
    found, title, note = failure_cards(columns, limit)
    return html_document(title, f"<p>{note}</p>{found}")
