"""What an iteration must cost against what it does cost: forwards counted and measured, in one run.

A forward of the batch without gradient is timed between the iterations; medians; ratios only, as clocks here drift.
Usage: python benchmarks/iteration.py [--threads 1] [--rounds 7] [--out results/iteration.json]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from advdmd.models import load
from advdmd.players import make_players
from advdmd.recipes import find
from advdmd.rng import Rng
from advdmd.supply import supply


def clock(f) -> float:
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


def measure(name: str, rounds: int, threads: int, *changes: str) -> dict:
    """Median over rounds of (iteration time / forward time), each iteration bracketed by forwards."""
    _, r = find.resolve(name, ["data.prompts=16", f"threads={threads}", *changes])
    torch.set_num_threads(threads)
    backbone, _ = load.load(r.teacher)
    data, a = supply(r, backbone), r.algorithm
    cast = make_players(r, backbone, data.null)
    step = max(range(r.iterations), key=lambda i: sum(r.forwards(i).values()))  # a full iteration
    counted = sum(r.forwards(step).values())
    batch, ids = data.deal(0)
    t = torch.full((len(batch),), 0.5)

    @torch.no_grad()
    def forward() -> None:
        for _ in range(3):
            backbone.velocity(backbone.net, batch.real, t, batch.cond)

    ratios = []
    for i in range(rounds + 1):
        before = clock(forward) / 3
        took = clock(lambda: a.iteration(cast, batch, step, Rng(0, step, ids)))
        after = clock(forward) / 3
        if i:  # the first round warms up
            ratios.append(took / ((before + after) / 2))
    measured = statistics.median(ratios)
    return {
        "recipe": " ".join((name, *changes)),
        "counted": counted,
        "measured": round(measured, 2),
        "eta": round(counted / measured, 3),
        "batch": len(batch),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    # The recipe as it is, and what its many small minibatches of the fake score cost: one instead of two.
    runs = [(n, *c) for n in ("mini-sd35-advdmd", "mini-sd35-dmd2") for c in ((), ("algorithm.critic_steps=1",))]
    rows = [measure(n, args.rounds, args.threads, *c) for n, *c in runs]
    print("| recipe | counted F | measured F | eta |\n|---|---|---|---|")
    for r in rows:
        print(f"| {r['recipe']} | {r['counted']:g} | {r['measured']:g} | {r['eta']:.2f} |")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
