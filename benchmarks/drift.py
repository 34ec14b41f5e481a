"""How far a policy's replay drifts from its trajectory in low precision: the ratio that must be 1 before any update.

    python benchmarks/drift.py [--out results/reliability/drift.json]

The shipped mini-sd35 at 4 steps, 32 samples; what the guard of AdvDMD stops is any |ratio - 1| above 1e-5.
"""

import argparse
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from advdmd import flow
from advdmd.algorithms.advdmd import AdvDMD
from advdmd.algorithms.base import RATIO_TOLERANCE
from advdmd.files import write_text
from advdmd.models import loading
from advdmd.rollout import rollout, step_distribution
from advdmd.transitions import cps

SAMPLES, STEPS = 32, 4


def ratios(dtype: torch.dtype, low_replay: bool, micro: int) -> torch.Tensor:
    """[3, N] |ratio - 1| of the stochastic steps: rolled out in one piece, replayed `micro` samples at a time."""
    backbone, _ = loading.load("mini-sd35", dtype=dtype)
    cond = backbone.encode_text(backbone.tokenize(["a picture of a red circle and a blue square"] * SAMPLES))
    noise = torch.randn(STEPS, SAMPLES, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))

    def student(x: torch.Tensor, t: torch.Tensor, c: Any) -> torch.Tensor:
        return backbone.velocity(backbone.net, x, t, c)

    grid, coefficients = flow.grid(STEPS, 1.2), cps(1.0)
    trajectory = rollout(student, cond, noise, grid, coefficients)
    error = torch.zeros(STEPS - 1, SAMPLES)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if low_replay else nullcontext():
        for i in torch.arange(SAMPLES).split(micro):
            for k in range(STEPS - 1):
                step, _ = step_distribution(student, trajectory.x[k, i], grid[k], grid[k + 1], cond[i], coefficients)
                error[k, i] = ((step.neg_mse(trajectory.x[k + 1, i]) - trajectory.neg_mse[k, i]).exp() - 1).abs()
    return error


def main() -> None:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("--out", type=Path, default=Path("results/reliability/drift.json"))
    args = ask.parse_args()
    torch.set_num_threads(1)
    cases = {
        "float32, same micro-batches": (torch.float32, False, SAMPLES),
        "float32, other micro-batches": (torch.float32, False, 8),
        "bfloat16, same micro-batches": (torch.bfloat16, False, SAMPLES),
        "bfloat16, other micro-batches": (torch.bfloat16, False, 8),
        "float32 trajectory, bfloat16 replay": (torch.float32, True, SAMPLES),
    }
    clip = AdvDMD().clip_range * math.sqrt(65536 / 256)
    rows = {}
    for name, case in cases.items():
        error = ratios(*case)
        rows[name] = {
            "max": float(f"{error.max().item():.3g}"),
            "outside_clip_range": round((error > clip).float().mean().item(), 3),
            "stopped": bool(error.max() > RATIO_TOLERANCE),
        }
        print(
            f"{name:32} max |ratio - 1| {rows[name]['max']:.2e}, outside the clip range {rows[name]['outside_clip_range']:.0%}"
        )
    write_text(args.out, json.dumps({"clip_range": clip, "tolerance": RATIO_TOLERANCE, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
