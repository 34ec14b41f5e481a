"""Spread of what a prompt leaves open, against the renderer's own: a student that wins by collapse has not won."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from advdmd.mini.world.checker import ObservedScene, read_scene
from advdmd.mini.world.render import render, to_uint8
from advdmd.mini.world.scene import Spec, World, draw_scene

FACTORS = ("background", "color", "size", "position")


def _pair(a: ObservedScene, b: ObservedScene, spec: Spec) -> dict[str, float]:
    """How far two images of one prompt differ in each factor it leaves open; objects matched by shape."""
    out: dict[str, float] = {}
    if spec.background is None and a.background and b.background:
        out["background"] = float(a.background != b.background)
    for g in spec.groups:
        mine, theirs = ([o for o in s.blobs if o.shape == g.shape] for s in (a, b))
        if g.count != 1 or len(mine) != 1 or len(theirs) != 1:
            continue
        o, p = mine[0], theirs[0]
        out["position"] = float(np.hypot(o.x - p.x, o.y - p.y))
        if g.size is None:
            out["size"] = float(o.size != p.size)
        if g.color is None and o.color and p.color:
            out["color"] = float(o.color != p.color)
    return out


def _spread(seen: Sequence[ObservedScene], prompts: Sequence[str], specs: Mapping[str, Spec]) -> dict[str, float]:
    """Mean difference within prompts, per factor (an unbiased estimate whatever the number of images)."""
    by_prompt: dict[str, list[ObservedScene]] = {}
    for s, p in zip(seen, prompts, strict=True):
        by_prompt.setdefault(p, []).append(s)
    found: dict[str, list[float]] = {f: [] for f in FACTORS}
    for p, images in by_prompt.items():
        for a, b in combinations(images, 2):
            for f, d in _pair(a, b, specs[p]).items():
                found[f].append(d)
    return {f: float(np.mean(v)) for f, v in found.items() if v}


def diversity(
    specs: Mapping[str, Spec], world: World, images: np.ndarray, ids: Sequence[str], *, pairs: bool = False, seed: int = 0
) -> dict[str, float]:
    """Spread of each open factor as a share of the renderer's on the same prompts, and their mean.

    1 is as varied.

    images [N, 32, 32, 3] uint8 of the specs `ids` [N], drawn from `world`; pairs: with held-out shape x colour pairs. Empty if
    the prompts leave nothing open.
    """
    rng = np.random.default_rng(seed)
    true = to_uint8(render([draw_scene(specs[i], rng, world, pairs=pairs) for i in ids]))
    ours, rendered = (_spread(read_scene(x), ids, specs) for x in (images, true))
    shares = {f: ours[f] / rendered[f] for f in FACTORS if f in ours and rendered.get(f)}
    return {**shares, "mean": float(np.mean(list(shares.values())))} if shares else {}
