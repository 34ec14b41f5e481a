"""The exact judge of the miniature: pixels to objects, with no learning and nothing tuned per run.

Prefilter, background from the border, unmix each pixel against the eight colours, connected components, sub-pixel
area and centroid from the soft rim, shape by correlation with templates drawn by the renderer. Batched over images.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy import ndimage

from advdmd.mini.world.render import render
from advdmd.mini.world.scene import BACKGROUNDS, COLORS, SHAPES, SIZE, Scene, SceneObject

PALETTE = np.array(list(COLORS.values()), np.float32)
GREYS = np.array(list(BACKGROUNDS.values()), np.float32)
BACKGROUND_TOLERANCE = 0.16
CORE, RIM, MIN_AREA = 0.5, 0.12, 10  # coverage of core and rim pixels; pixels in the smallest blob that counts
PATCH, SPAN = 11, 1.75  # canonical patch: side in samples, half-width in equal-area radii
MATCH = 0.80  # least correlation of a classified shape
LARGE_RADIUS = 4.75  # equal-area radius in pixels above which an object is large
OFF_LINE, CORE_COVERAGE = 0.22, (0.55, 1.35)  # how far from the background-colour line a valid colour may lie
BLURS = (0.6, 1.0, 1.3)  # of templates, beside sharp ones: a blurred cross must not look like a diamond
CANVAS = SIZE + 2  # images are tiled with a gap, so that one labelling serves a batch


@dataclass(frozen=True)
class ObservedObject:
    """One object found. `shape` is None when nothing matches; `color` is None when the colour is not valid."""

    shape: str | None
    color: str | None
    size: str
    x: float
    y: float
    area: float
    match: float
    box: tuple[float, float, float, float]  # left, top, right, bottom, pixels


@dataclass(frozen=True)
class ObservedScene:
    """What the checker sees in one image; `background` is None when the border is none of the three greys."""

    background: str | None
    blobs: tuple[ObservedObject, ...]


def _prefilter(image: np.ndarray) -> np.ndarray:
    kernel = np.array([1, 6, 1], np.float32) / 8
    return ndimage.convolve1d(ndimage.convolve1d(image, kernel, 1, mode="nearest"), kernel, 2, mode="nearest")


def _background(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Border colour [N, 3], snapped to a grey where one is near enough, and that grey's index [N] (-1: none)."""
    edge = np.ones((SIZE, SIZE), bool)
    edge[2:-2, 2:-2] = False
    color = np.median(image[:, edge], axis=1)
    off = np.abs(color[:, None] - GREYS[:, None]).max(-1)
    index = np.where(off.min(1) <= BACKGROUND_TOLERANCE, off.argmin(1), -1)
    return np.where((index >= 0)[:, None], GREYS[index][:, None], color), index


def _unmix(image: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per pixel [N, 32, 32]: the best colour's index, the coverage by it, the distance from its line."""
    direction = PALETTE - background[:, None]  # [N, 8, 3]
    squared = np.maximum((direction**2).sum(-1), 1e-6)
    diff = image - background[:, None, None]
    best = np.zeros(diff.shape[:3], np.int64)
    cover, residual = np.zeros(diff.shape[:3], np.float32), np.sqrt((diff**2).sum(-1))
    # No colour is nearer than .25 to a grey in all channels: what is nearer than .03 covers less than the rim needs.
    n, y, x = np.nonzero(np.abs(diff).max(-1) > 0.03)
    d, square = diff[n, y, x], squared[n]
    share = np.einsum("pc,pkc->pk", d, direction[n]) / square
    # |d - a v|^2 = |d|^2 - 2 a <d, v> + a^2 |v|^2 with a clipped to [0, 1.35]
    a = share.clip(0, CORE_COVERAGE[1])
    off = (d**2).sum(-1)[:, None] + (a * a - 2 * a * share) * square
    k, p = off.argmin(1), np.arange(len(d))
    best[n, y, x], cover[n, y, x] = k, share[p, k]
    residual[n, y, x] = np.sqrt(np.maximum(off[p, k], 0))
    return best, cover, residual


def _tile(x: np.ndarray) -> np.ndarray:
    """[N, 32, 32] -> one canvas [N * 34, 34] with a gap of two around every image."""
    return np.pad(x, ((0, 0), (1, 1), (1, 1))).reshape(-1, CANVAS)


def _components(color: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Labels on the canvas: one per 8-connected core of one colour; too small ones and the rest are 0."""
    core = cover >= CORE
    labels = np.zeros(core.shape, np.int32)
    total: Any = ndimage.label(core, np.ones((3, 3), int), output=labels)
    seen = np.zeros((total + 1, len(PALETTE)), bool)
    seen[labels[core], color[core]] = True
    mixed = (seen.sum(1) > 1)[labels]  # touching objects of several colours: label those once more, colour by colour
    labels[mixed] = 0
    for c in np.unique(color[mixed]):
        found = np.zeros_like(labels)
        n: Any = ndimage.label(mixed & (color == c), np.ones((3, 3), int), output=found)
        labels += np.where(found > 0, found + total, 0)
        total += n
    keep = np.bincount(labels.ravel(), minlength=total + 1) >= MIN_AREA
    keep[0] = False
    return (np.cumsum(keep) * keep)[labels]


def _patches(soft: np.ndarray, labels: np.ndarray, y: np.ndarray, x: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """[n, 121] bilinear samples of each object's own coverage around its centroid, in units of its radius."""
    grid = np.linspace(-SPAN, SPAN, PATCH)
    gy, gx = (g.ravel() for g in np.meshgrid(grid, grid, indexing="ij"))
    py, px = y[:, None] + radius[:, None] * gy, x[:, None] + radius[:, None] * gx
    iy, ix = np.floor(py).astype(int), np.floor(px).astype(int)
    fy, fx, own = py - iy, px - ix, np.arange(1, len(y) + 1)[:, None]
    out = np.zeros(py.shape, np.float32)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        r, c = iy + dy, ix + dx
        inside = (r >= 0) & (r < soft.shape[0]) & (c >= 0) & (c < soft.shape[1])
        r, c = np.where(inside, r, 0), np.where(inside, c, 0)
        weight = (fy if dy else 1 - fy) * (fx if dx else 1 - fx)
        out += weight * np.where(inside & (labels[r, c] == own), soft[r, c], 0)
    return out


def _zero_mean(p: np.ndarray) -> np.ndarray:
    p = p - p.mean(1, keepdims=True)
    return p / np.maximum(np.linalg.norm(p, axis=1, keepdims=True), 1e-6)


@dataclass(frozen=True)
class _Measured:
    """Every object of a batch, as columns."""

    image: np.ndarray
    color: np.ndarray
    y: np.ndarray
    x: np.ndarray
    area: np.ndarray
    off: np.ndarray
    core_cover: np.ndarray
    box: np.ndarray
    patch: np.ndarray


def _measure(color: np.ndarray, cover: np.ndarray, residual: np.ndarray) -> _Measured:
    color, cover, residual = (_tile(a) for a in (color, cover, residual))
    labels = _components(color, cover)
    n = int(labels.max())
    core = labels > 0
    flat = labels[core]
    count = np.bincount(flat, minlength=n + 1)[1:]
    mean = lambda a: np.bincount(flat, a[core], n + 1)[1:] / np.maximum(count, 1)  # noqa: E731
    own_color = np.rint(mean(color.astype(float))).astype(int)
    # The rim joins the component it touches; grey dilation gives each free pixel a neighbouring label.
    near = ndimage.grey_dilation(labels, size=(3, 3))
    whole = np.where(core, labels, np.where(cover > RIM, near, 0))
    soft = cover.clip(0, 1)
    rows, cols = np.nonzero(whole)
    who, weight = whole[rows, cols], soft[rows, cols]
    area = np.bincount(who, weight, n + 1)[1:]
    y = np.bincount(who, weight * rows, n + 1)[1:] / np.maximum(area, 1e-6)
    x = np.bincount(who, weight * cols, n + 1)[1:] / np.maximum(area, 1e-6)
    patch = _patches(soft, whole, y, x, np.sqrt(area / np.pi))
    slices = ndimage.find_objects(labels, n)
    box = np.array([(s[1].start, s[0].start, s[1].stop, s[0].stop) for s in slices if s], float).reshape(-1, 4)
    image = (y // CANVAS).astype(int)
    top = image * CANVAS + 1  # first row of the image on the canvas
    box -= np.stack([np.ones_like(top), top, np.ones_like(top), top], 1) if n else 0
    return _Measured(image, own_color, y - top + 0.5, x - 1 + 0.5, area, mean(residual), mean(cover), box, patch)


def _observe(images: np.ndarray) -> tuple[np.ndarray, _Measured]:
    image = _prefilter(images)
    background, index = _background(image)
    return index, _measure(*_unmix(image, background))


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Zero-mean unit patches [T, 121] and their shape index [T]: shapes x radii x sub-pixel places x blurs."""
    state_template = [(16.0, 16.0), (16.5, 16.0), (16.0, 16.5), (16.5, 16.5), (16.25, 16.25)]
    things = [
        SceneObject(s, "blue", "", x, y, r, COLORS["blue"])
        for s in SHAPES
        for r in (3.7, 4.1, 5.7, 6.3)
        for x, y in state_template
    ]
    image = render([Scene("white", (t,)) for t in things])
    sets = [image, *(ndimage.gaussian_filter(image, (0, b, b, 0)) for b in BLURS)]
    seen = [_observe(s)[1] for s in sets]
    shape = np.array([SHAPES.index(t.shape) for t in things])
    assert all(len(m.patch) == len(things) for m in seen)
    # Objects come out sorted by colour then by place on the canvas; one colour keeps the images' order.
    return _zero_mean(np.concatenate([m.patch[np.argsort(m.image)] for m in seen])), np.tile(shape, len(sets))


def _read_scene(images: np.ndarray) -> list[ObservedScene]:
    index, m = _observe(images)
    templates, shape_of = _templates()
    match = _zero_mean(m.patch) @ templates.T
    best = match.argmax(1) if len(match) else np.zeros(0, int)
    score = match[np.arange(len(match)), best]
    valid = (m.off <= OFF_LINE) & (m.core_cover >= CORE_COVERAGE[0]) & (m.core_cover <= CORE_COVERAGE[1])
    large = np.sqrt(m.area / np.pi) > LARGE_RADIUS
    names, greys = list(COLORS), list(BACKGROUNDS)
    blobs: list[list[ObservedObject]] = [[] for _ in images]
    for k in range(len(score)):
        blobs[m.image[k]].append(
            ObservedObject(
                SHAPES[shape_of[best[k]]] if score[k] >= MATCH else None,
                names[m.color[k]] if valid[k] else None,
                "large" if large[k] else "small",
                float(m.x[k]),
                float(m.y[k]),
                float(m.area[k]),
                float(score[k]),
                (float(m.box[k, 0]), float(m.box[k, 1]), float(m.box[k, 2]), float(m.box[k, 3])),
            )
        )
    return [ObservedScene(greys[i] if i >= 0 else None, tuple(b)) for i, b in zip(index, blobs, strict=True)]


def read_scene(images: np.ndarray, batch: int = 256) -> list[ObservedScene]:
    """What each image [N, 32, 32, 3], uint8 or float in [0, 1], shows. Raises ValueError on another shape."""
    if images.ndim != 4 or images.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"checker: images of shape {images.shape}, expected [N, {SIZE}, {SIZE}, 3]")
    as_float = images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
    return [s for i in range(0, len(images), batch) for s in _read_scene(as_float[i : i + batch])]


def same_scene(seen: ObservedScene, scene: Scene) -> bool:
    """Whether the checker read the scene exactly: background, and shape, colour and size of every object in place."""
    if seen.background != scene.background or len(seen.blobs) != len(scene.things):
        return False
    free: list[ObservedObject] = list(seen.blobs)
    for t in scene.things:
        b = min(free, key=lambda b: (b.x - t.x) ** 2 + (b.y - t.y) ** 2)
        if (b.shape, b.color, b.size) != (t.shape, t.color, t.size) or abs(b.x - t.x) + abs(b.y - t.y) > 1.5:
            return False
        free.remove(b)
    return True
