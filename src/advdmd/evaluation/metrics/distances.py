"""How far two sets of images are apart, and how varied one prompt's images are, in the features of an image encoder.

The Frechet distance is FID's formula (1706.08500, Eq. 6), the kernel distance KID's (1801.01401, Sec. 4). Their name says whose
features they are: only those of the Inception network give figures to set beside published FIDs, and any CLIP may be used here.
"""

from collections.abc import Sequence

import numpy as np


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^1/2) of features [N, D], [M, D]; biased upwards for few images.

    Raises ValueError if a side has fewer than two.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"{len(x)} and {len(y)} images: a covariance needs at least two on each side")
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, b = (np.atleast_2d(np.cov(z, rowvar=False)) for z in (x, y))
    roots = np.sqrt(np.clip(np.linalg.eigvals(a @ b).real, 0, None))  # the eigenvalues of a product of such matrices are >= 0
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * roots.sum())


def kernel(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD under (x . y / D + 1)^3 of features [N, D], [M, D].

    Raises ValueError if a side has fewer than two.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"{len(x)} and {len(y)} images: an unbiased estimate needs at least two on each side")
    k = lambda a, b: (a.astype(np.float64) @ b.astype(np.float64).T / a.shape[1] + 1) ** 3  # noqa: E731
    within = lambda z: (k(z, z).sum() - np.trace(k(z, z))) / (len(z) * (len(z) - 1))  # noqa: E731
    return float(within(x) + within(y) - 2 * k(x, y).mean())


def within_prompts(features: np.ndarray, prompts: Sequence[str]) -> float:
    """Mean cosine distance between images of one prompt, over prompts that have several; features [N, D] of unit length.

    Raises ValueError if no prompt has two.
    """
    found = []
    for p in dict.fromkeys(prompts):
        mine = features[[i for i, q in enumerate(prompts) if q == p]]
        if len(mine) > 1:
            found.append(1 - (np.square(mine.sum(0)).sum() - len(mine)) / (len(mine) * (len(mine) - 1)))
    if not found:
        raise ValueError("no prompt has two images: there is nothing to compare within a prompt")
    return float(np.mean(found))
