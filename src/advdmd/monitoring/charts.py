"""Curves as SVG that follows the page's colours: no script, no font, no network."""

import math
from collections.abc import Sequence

WIDTH, HEIGHT = 340, 150
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 8, 20
POINTS = 150  # a curve is thinned to about so many, each the median of its neighbours

Curve = tuple[Sequence[float], Sequence[float]]  # x ascending, y


def thin(curve: Curve) -> Curve:
    """Finite points only; of many, the median of each run of neighbours."""
    pairs = [(x, y) for x, y in zip(*curve, strict=True) if math.isfinite(y)]
    size = max(1, -(-len(pairs) // POINTS))
    parts = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return [p[len(p) // 2][0] for p in parts], [sorted(y for _, y in p)[len(p) // 2] for p in parts]


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from low to high."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5) if m * power >= rough), 10 * power)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_label(v: float) -> str:
    """A number of an axis in few characters."""
    return f"{v / 1000:g}k" if abs(v) >= 10_000 else f"{v:.4g}"


def line_chart(
    curves: Sequence[Curve],
    band: tuple[float, float] | None = None,
    label: str = "",
    x_range: tuple[float, float] | None = None,
) -> str:
    """One SVG: curve i has the class c{i}, `band` is the shaded range. Axes are fitted to the curves, or x to `x_range`."""
    curves = [thin(c) for c in curves]
    xs, ys = ([v for c in curves for v in c[axis]] for axis in (0, 1))
    if not ys:
        return ""
    (x0, x1), (y0, y1) = _range([*xs, *(x_range or ())], 0.0), _range(ys, 0.06)
    px = lambda x: LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)  # noqa: E731
    py = lambda y: TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)  # noqa: E731
    out = [f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {HEIGHT}"><title>{label}</title>']
    if band:
        low, high = (min(max(v, y0), y1) for v in band)
        size = f'width="{WIDTH - LEFT - RIGHT}" height="{py(low) - py(high):.1f}"'
        out.append(f'<rect class="band" x="{LEFT}" y="{py(high):.1f}" {size}/>')
    for y in ticks(y0, y1):
        out.append(f'<path class="grid" d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text class="end" x="{LEFT - 5}" y="{py(y) + 4:.1f}">{tick_label(y)}</text>')
    for x in ticks(x0, x1, 5):
        out.append(f'<text class="mid" x="{px(x):.1f}" y="{HEIGHT - 5}">{tick_label(x)}</text>')
    for i, (cx, cy) in enumerate(curves):
        if len(cx) == 1:
            out.append(f'<circle class="c{i}" cx="{px(cx[0]):.1f}" cy="{py(cy[0]):.1f}" r="3"/>')
        elif cx:
            out.append(f'<path class="c{i}" d="M{" ".join(f"{px(x):.1f} {py(y):.1f}" for x, y in zip(cx, cy, strict=True))}"/>')
    return "".join([*out, "</svg>"])


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    """Of an axis: lowest to highest with a margin; of a single value, something around it."""
    low, high = min(values), max(values)
    extra = margin * (high - low) or (0.5 * abs(low) or 1.0) * (low == high)
    return low - extra, high + extra
