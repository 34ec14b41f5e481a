"""What a scene is, what a prompt asks of it, and how a scene that satisfies a prompt is drawn at random.

Pixels are the unit of length, the image is 32 x 32, x grows rightwards and y downwards.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from itertools import product

import numpy as np

SIZE = 32
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.12, 0.12),
    "orange": (0.95, 0.55, 0.05),
    "yellow": (0.95, 0.92, 0.15),
    "green": (0.10, 0.70, 0.20),
    "cyan": (0.10, 0.85, 0.90),
    "blue": (0.12, 0.25, 0.90),
    "purple": (0.55, 0.12, 0.80),
    "pink": (0.98, 0.45, 0.75),
}
BACKGROUNDS = {"black": 0.06, "gray": 0.50, "white": 0.95}
RADII = {"small": (3.7, 4.1), "large": (5.7, 6.3)}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# Extent of each shape around its centroid at radius 1: left, up, right, down. The outlines (render.py) are sized
# so that every shape's equal-area radius is .90-1.00 of the nominal one: size is then readable from area alone.
EXTENTS: dict[str, tuple[float, float, float, float]] = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (0.886, 0.886, 0.886, 0.886),
    "triangle": (1.213, 1.40, 1.213, 0.70),
    "cross": (1.08, 1.08, 1.08, 1.08),
    "ring": (1.10, 1.10, 1.10, 1.10),
    "diamond": (1.20, 1.20, 1.20, 1.20),
    "bar": (1.20, 0.53, 1.20, 0.53),
    "star": (1.189, 1.25, 1.189, 1.012),
}
SHAPES = tuple(EXTENTS)
GAP, MARGIN, JITTER = 1.6, 1.0, 0.03  # between boxes, to the border, of colours
APART, SKEW = 9.0, 1.6  # a stated relation: px along its axis, and times more than across
MAX_OBJECTS = 4
# Few objects are as often large as small; many only fit when most are small.
P_LARGE = {1: 0.5, 2: 0.5, 3: 0.35, 4: 0.2}


@dataclass(frozen=True)
class SceneObject:
    """One drawn object: `x`, `y` its centroid and `radius` in pixels, `rgb` its colour after jitter."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """A background and the objects on it."""

    background: str
    things: tuple[SceneObject, ...]


@dataclass(frozen=True)
class Group:
    """`count` objects of one shape; None leaves the attribute free."""

    shape: str
    count: int = 1
    color: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Spec:
    """All that a prompt says. `relation` = (i, name, j): every object of group i stands so to every one of group j."""

    groups: tuple[Group, ...]
    relation: tuple[int, str, int] | None = None
    background: str | None = None

    def owners(self) -> list[int]:
        """Group index of each object, in drawing order."""
        return [i for i, g in enumerate(self.groups) for _ in range(g.count)]


def stable_hash(text: str) -> int:
    """63-bit hash of a text that is the same in every process and on every machine."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class World:
    """Which shapes and colours occur.

    Raises ValueError on unknown ones, or too few.

    One colour per shape is held out by hash: those pairs are never drawn nor named in training and make the compositional
    split.
    """

    shapes: tuple[str, ...] = SHAPES
    colors: tuple[str, ...] = tuple(COLORS)

    def __post_init__(self) -> None:
        if bad := [w for w in (*self.shapes, *self.colors) if w not in SHAPES and w not in COLORS]:
            raise ValueError(f"World: unknown {bad}; shapes are {SHAPES}, colours {tuple(COLORS)}")
        if len(self.shapes) < 3 or len(self.colors) < len(self.shapes):
            raise ValueError("World: needs at least three shapes, and at least as many colours as shapes")

    @cached_property
    def held_out_pairs(self) -> frozenset[tuple[str, str]]:
        colors = sorted(self.colors, key=lambda c: stable_hash(f"pair/{c}"))
        return frozenset(zip(self.shapes, colors, strict=False))

    def holds_out(self, spec: Spec) -> bool:
        """Whether a spec names a held-out pair."""
        return any((g.shape, g.color) in self.held_out_pairs for g in spec.groups)


FULL = World()
# Half the shapes and half the colours: what two cores learn in an hour. Rules, sizes, counts and relations are the same.
HALF = World(("circle", "square", "triangle", "cross"), ("red", "yellow", "green", "blue"))
WORLDS = {"full": FULL, "half": HALF}


def _related(d: np.ndarray, name: str) -> np.ndarray:
    """d [..., 2] = centre of i minus centre of j; true where the stated relation holds beyond doubt."""
    axis, sign = (0, RELATIONS[name][0]) if RELATIONS[name][0] else (1, RELATIONS[name][1])
    along, across = d[..., axis] * sign, np.abs(d[..., 1 - axis])
    return (along >= APART) & (along >= SKEW * across)


def _layouts(extents: np.ndarray, rng: np.random.Generator, tries: int) -> np.ndarray:
    """[tries, n, 2] candidate centres inside the margins: half anywhere, half one to a cell of a shuffled 2 x 2 grid."""
    low, high = MARGIN + extents[:, :2], SIZE - MARGIN - extents[:, 2:]
    free = rng.uniform(low, high, (tries, len(extents), 2))
    cell = np.argsort(rng.random((tries, MAX_OBJECTS)), axis=1)[:, : len(extents)]
    center = SIZE / 4 + SIZE / 2 * np.stack([cell % 2, cell // 2], -1)
    tidy = np.clip(center + rng.uniform(-4, 4, free.shape), low, high)
    return np.where((np.arange(tries) % 2 == 0)[:, None, None], free, tidy)


def _place(spec: Spec, extents: np.ndarray, rng: np.random.Generator, tries: int) -> np.ndarray | None:
    """[n, 2] centres that keep every gap and the stated relation, or None if no candidate does."""
    c, owner = _layouts(extents, rng, tries), np.array(spec.owners())
    low, high = c - extents[:, :2], c + extents[:, 2:]
    ok = np.ones(tries, bool)
    for i in range(len(owner)):
        for j in range(i):
            ok &= (np.maximum(low[:, i] - high[:, j], low[:, j] - high[:, i]) >= GAP).any(-1)
    if spec.relation:
        a, name, b = spec.relation
        for i, j in product(np.flatnonzero(owner == a), np.flatnonzero(owner == b)):
            ok &= _related(c[:, i] - c[:, j], name)
    return c[ok.argmax()] if ok.any() else None


def draw_scene(
    spec: Spec, rng: np.random.Generator, world: World = FULL, *, pairs: bool = False, attempts: int = 4000
) -> Scene:
    """A random scene in which `spec` is true and nothing else is present.

    Free attributes are uniform over `world` (sizes by P_LARGE); held-out pairs appear only if named or with `pairs`. Raises
    ValueError if `attempts` x 64 layouts hold no room for it.
    """
    n = sum(g.count for g in spec.groups)
    if not 1 <= n <= MAX_OBJECTS:
        raise ValueError(f"{n} objects asked for: a scene holds 1 to {MAX_OBJECTS}")
    background = spec.background or list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    owners = [spec.groups[i] for i in spec.owners()]
    for _ in range(attempts):
        sizes = [g.size or ("large" if rng.random() < P_LARGE[n] else "small") for g in owners]
        radii = np.array([rng.uniform(*RADII[s]) for s in sizes])
        centers = _place(spec, np.array([EXTENTS[g.shape] for g in owners]) * radii[:, None], rng, tries=64)
        if centers is not None:
            break
    else:
        raise ValueError(f"no room for {spec}: fewer or smaller objects fit")
    things = []
    for g, size, radius, (x, y) in zip(owners, sizes, radii, centers, strict=True):
        free = [c for c in world.colors if pairs or (g.shape, c) not in world.held_out_pairs]
        color = g.color or free[rng.integers(len(free))]
        red, green, blue = np.clip(np.array(COLORS[color]) + rng.uniform(-JITTER, JITTER, 3), 0, 1).tolist()
        things.append(SceneObject(g.shape, color, size, float(x), float(y), float(radius), (red, green, blue)))
    return Scene(background, tuple(things))


def can_draw(spec: Spec) -> bool:
    """Proof by construction, with a stream that depends on the spec alone.

    Three attempts against the 4,000 of `draw`: what passes here is roomy enough never to fail there.
    """
    try:
        draw_scene(spec, np.random.default_rng(stable_hash(repr(spec))), attempts=3)
    except ValueError:
        return False
    return True


TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def random_spec(task: str, rng: np.random.Generator, world: World = FULL) -> Spec:
    """A spec of one of GenEval's six tasks, or "dense": 2-3 fully described groups, background, one relation.

    Raises ValueError on another task.
    """
    shapes = [str(s) for s in rng.permutation(world.shapes)]
    colors = [str(c) for c in rng.permutation(world.colors)]
    relation = (0, list(RELATIONS)[rng.integers(4)], 1)
    match task:
        case "single_object":
            return Spec((Group(shapes[0]),))
        case "two_object":
            return Spec((Group(shapes[0]), Group(shapes[1])))
        case "counting":
            return Spec((Group(shapes[0], int(rng.integers(2, 5))),))
        case "colors":
            return Spec((Group(shapes[0], color=colors[0]),))
        case "position":
            return Spec((Group(shapes[0]), Group(shapes[1])), relation)
        case "color_attr":
            return Spec((Group(shapes[0], color=colors[0]), Group(shapes[1], color=colors[1])))
        case "dense":
            counts = [(1, 1), (1, 1, 1), (2, 1), (1, 2), (2, 1, 1), (1, 1, 2), (3, 1)][rng.integers(7)]
            groups = tuple(
                Group(s, k, str(rng.choice(colors)), ("small", "large")[int(rng.random() < P_LARGE[sum(counts)])])
                for s, k in zip(shapes, counts, strict=False)
            )
            i, j = rng.permutation(len(groups))[:2]
            return Spec(groups, (int(i), relation[1], int(j)), list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))])
        case _:
            raise ValueError(f"task {task!r}: one of {', '.join((*TASKS, 'dense'))}")


def specs(task: str, rng: np.random.Generator, world: World = FULL, *, pairs: bool | None = False) -> Iterator[Spec]:
    """Endless drawable specs of a task; `pairs` False: no held-out pair, True: at least one, None: either."""
    while True:
        spec = random_spec(task, rng, world)
        if pairs and not world.holds_out(spec):
            shape, color = sorted(world.held_out_pairs)[rng.integers(len(world.held_out_pairs))]
            if spec.groups[0].color is None or any(g.shape == shape for g in spec.groups[1:]):
                continue
            spec = replace(spec, groups=(replace(spec.groups[0], shape=shape, color=color), *spec.groups[1:]))
        if (pairs is False and world.holds_out(spec)) or not can_draw(spec):
            continue
        yield spec
