"""How the cost of an AdvDMD iteration grows: with batch, group, steps, latent size, and with one process or two.

Each setting is timed alternately with the main job's, so that other work of the machine falls on both; ratios only.
    python benchmarks/scaling.py [--rounds 5] [--out results/performance/scaling.json]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from advdmd.distillation.build import Builder, setup
from advdmd.files import write_text
from advdmd.recipes import registry
from advdmd.rng import Rng

RECIPE, COMMON = "mini-sd35-advdmd", ["data.num_prompts=16", "threads=1"]
# Of the recipe: 8 prompts x 4 samples, 4 steps, latents of 8 x 8.
AXES = {
    "batch": {str(4 * n): [f"prompts_per_step={n}"] for n in (2, 4, 8, 16)},
    "group": {str(g): [f"algorithm.group_size={g}", f"prompts_per_step={32 // g}"] for g in (2, 4, 8, 16)},
    "steps": {str(k): [f"algorithm.steps={k}"] for k in (1, 2, 4, 8)},
}
SIDES = (8, 16, 32)


class Setting:
    """A recipe with changes, ready to run; with a `side` of its latents, by a network with random weights."""

    def __init__(self, *changes: str, side: int | None = None):
        self.recipe = registry.resolve(RECIPE, [*COMMON, *changes])[1]
        backbone, data, self.models = setup(self.recipe, self.recipe.data.open(self.recipe.teacher))
        self.batch, self.ids = data.batch_fn(0)
        if side:
            old: Any = backbone.net
            net = type(old).from_config({**old.config, "sample_size": side, "pos_embed_max_size": side})
            backbone.net = net.requires_grad_(False).eval()
            times = side // self.batch.real_latents.shape[-1]
            self.batch = replace(self.batch, real_latents=self.batch.real_latents.repeat(1, 1, times, times))
            self.models = Builder(self.recipe, backbone, data.null).build()
        steps = range(self.recipe.iterations)
        self.step = max(steps, key=lambda i: sum(self.recipe.forwards(i).values()))  # a full iteration

    def seconds_per_sample(self) -> float:
        began = time.perf_counter()
        self.recipe.algorithm.train_step(self.models, self.batch, self.step, Rng(0, self.step, self.ids))
        return (time.perf_counter() - began) / len(self.batch)


def axis(settings: Mapping[str, Callable[[], Setting]], base: Setting, rounds: int) -> dict[str, dict[str, float]]:
    """Time of a sample beside the main job's, and forwards of a sample beside its."""
    out = {}
    for value, make in settings.items():
        other = make()
        ratios = []
        for i in range(rounds + 1):
            ours, theirs = base.seconds_per_sample(), other.seconds_per_sample()
            if i:  # the first round warms up
                ratios.append(theirs / ours)
        counted = [sum(s.recipe.forwards(s.step).values()) for s in (other, base)]
        out[value] = {"time": round(statistics.median(ratios), 3), "forwards": round(counted[0] / counted[1], 3)}
        print(value, out[value], flush=True)
    return out


def processes(rounds: int) -> dict[str, float]:
    """Iterations a second of two processes beside one, same batch: replicas, and networks sharded over both."""

    def seconds(n: int, iterations: int, *more: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            words = [*COMMON, f"iterations={iterations}", "sample_every=0", "save_every=0", *more]
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"] if n > 1 else []
            command = [sys.executable, *launch, "-m", "advdmd", "train", RECIPE, *words, "--out", f"{folder}/run"]
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            return time.perf_counter() - began

    def pace(n: int, *more: str) -> float:
        return (seconds(n, 20, *more) - seconds(n, 4, *more)) / 16  # without the time of the start

    out: dict[str, list[float]] = {"replicas": [], "spread": []}
    for _ in range(rounds):
        one = pace(1)
        out["replicas"].append(one / pace(2))
        out["spread"].append(one / pace(2, "fsdp=true"))
    return {k: round(statistics.median(v), 3) for k, v in out.items()}


def main() -> None:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--out", type=Path, default=Path("results/performance/scaling.json"))
    args = ask.parse_args()
    torch.set_num_threads(1)
    axes = {name: {k: partial(Setting, *v) for k, v in settings.items()} for name, settings in AXES.items()}
    axes["latent side"] = {str(n): partial(Setting, side=n) for n in SIDES}
    base = Setting()
    found: dict[str, Any] = {name: axis(settings, base, args.rounds) for name, settings in axes.items()}
    found["two processes beside one"] = processes(max(1, args.rounds // 2))
    write_text(args.out, json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
