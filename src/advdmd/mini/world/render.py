"""Scenes to pixels: analytic signed distances, coverage clip(.5 - d, 0, 1), no overlap to resolve."""

from collections.abc import Callable, Sequence

import numpy as np

from advdmd.mini.world.scene import BACKGROUNDS, SIZE, Scene, SceneObject

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _box(x: np.ndarray, y: np.ndarray, hx: float, hy: float) -> np.ndarray:
    qx, qy = np.abs(x) - hx, np.abs(y) - hy
    return np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(y, np.abs(x) * np.sqrt(0.75) - y / 2) - 0.70


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_box(x, y, 1.08, 0.43), _box(x, y, 0.43, 1.08))


def _star(x: np.ndarray, y: np.ndarray, outer: float = 1.25, inner: float = 0.6875) -> np.ndarray:
    """Five points, one up: fold the plane into one half-sector, then one straight edge remains."""
    step = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + step / 2) % step - step / 2)
    px, py = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    ex, ey = inner * np.cos(step / 2) - outer, inner * np.sin(step / 2)
    return ((px - outer) * ey - py * ex) / np.hypot(ex, ey)


DISTANCES: dict[str, Distance] = {  # at radius 1, centroid at the origin
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: _box(x, y, 0.886, 0.886),
    "triangle": _triangle,
    "cross": _cross,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.80) - 0.30,
    "diamond": lambda x, y: (np.abs(x) + np.abs(y) - 1.20) / np.sqrt(2),
    "bar": lambda x, y: _box(x, y, 1.20, 0.53),
    "star": _star,
}


def coverage(things: Sequence[SceneObject]) -> np.ndarray:
    """[n, 32, 32] share of each pixel that each thing covers, in [0, 1]."""
    out = np.zeros((len(things), SIZE, SIZE), np.float32)
    center = np.arange(SIZE, dtype=np.float32) + 0.5
    for shape in {t.shape for t in things}:
        rows = [i for i, t in enumerate(things) if t.shape == shape]
        x, y, r = (np.array([getattr(things[i], k) for i in rows], np.float32)[:, None, None] for k in ("x", "y", "radius"))
        d = DISTANCES[shape]((center[None, None, :] - x) / r, (center[None, :, None] - y) / r) * r
        out[rows] = np.clip(0.5 - d, 0, 1)
    return out


def render(scenes: Sequence[Scene]) -> np.ndarray:
    """[N, 32, 32, 3] float32 in [0, 1]."""
    image = np.empty((len(scenes), SIZE, SIZE, 3), np.float32)
    image[:] = np.array([BACKGROUNDS[s.background] for s in scenes], np.float32)[:, None, None, None]
    things = [t for s in scenes for t in s.things]
    owner = np.repeat(np.arange(len(scenes)), [len(s.things) for s in scenes])
    cover = coverage(things)[..., None]
    np.add.at(image, owner, cover * (np.array([t.rgb for t in things], np.float32)[:, None, None] - image[owner, :1, :1]))
    return image.clip(0, 1)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """[0, 1] floats to the bytes a PNG holds."""
    return (image * 255 + 0.5).astype(np.uint8)
