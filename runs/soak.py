"""A long run of the smallest recipe: does memory, the number of open files, the metrics file or the cost of an iteration grow?

    python runs/soak.py [--iterations 20000] [--out results/reliability/soak.json]

Memory (resident) and open files are read every two seconds; slopes are fitted after the first tenth, in which pools fill.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from kill_test import teacher

from advdmd.files import write_text
from advdmd.monitoring.health import read_metrics

EVERY = 2.0  # seconds
WORDS = [
    "algorithm.group_size=2",
    "prompts_per_step=2",
    "data.num_prompts=8",
    "data.images_per_prompt=2",
    "threads=1",
    "discriminator.hidden_size=8",
]
WORDS += ["algorithm.steps=2", "algorithm.fake_score_updates=1", "discriminator.trunk=fake"]  # two updates and a policy update
WORDS += ["save_every=500", "sample_every=2000", "eval_every=2000", "eval_images=2"]


def watched(command: list[str], metrics: Path) -> list[tuple[float, float, float]]:
    """Run a command and sample its process every few seconds: iterations done, MB in memory, open files."""
    samples: list[tuple[float, float, float]] = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(EVERY)
            try:
                home = Path("/proc") / str(process.pid)
                memory = int((home / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
                done = json.loads(metrics.read_text().splitlines()[-1])["step"]
                samples.append((done, memory, len(os.listdir(home / "fd"))))
            except (OSError, IndexError, ValueError):  # before its first line, after its end, or between two lines
                continue
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return samples


def slope(steps: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Least squares after the first tenth: slope per 1,000 iterations; medians of the first and last values; the maximum."""
    late = steps >= steps[-1] / 10
    fit = np.polyfit(steps[late], values[late], 1)[0] * 1000
    first, last = (float(np.median(part)) for part in (values[late][:20], values[late][-20:]))
    return {
        "per_1000": float(f"{fit:.4g}"),
        "first": round(first, 4),
        "last": round(last, 4),
        "max": round(float(values.max()), 4),
    }


def main() -> None:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("--iterations", type=int, default=20000)
    ask.add_argument("--out", type=Path, default=Path("results/reliability/soak.json"))
    args = ask.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "run"
        words = [*WORDS, f"iterations={args.iterations}", f"algorithm.dm_only_iterations={args.iterations // 4}"]
        words += [f"teacher={teacher(Path(home) / 'teacher')}"]
        command = [sys.executable, "-m", "advdmd", "train", "mini-sd35-advdmd", *words, "--out", str(folder)]
        samples = watched(command, folder / "metrics.jsonl")
        metrics = read_metrics(folder)
        size = (folder / "metrics.jsonl").stat().st_size
        checkpoints = len(list((folder / "checkpoints").glob("*.safetensors")))
    steps, memory, files = (np.array(column, float) for column in zip(*samples, strict=True))
    policy = [m for m in metrics if "cost/efficiency" in m and "reward/final" in m]
    at, efficiency = (np.array([m[k] for m in policy]) for k in ("step", "cost/efficiency"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = {
        "iterations": args.iterations,
        "commit": os.environ.get("COMMIT", commit),
        "resident_mb": slope(steps, memory),
        "open_files": slope(steps, files),
        "eta": slope(at, efficiency),
        "metrics": {"lines": len(metrics), "bytes": size},
        "checkpoints_kept": checkpoints,
    }
    write_text(args.out, json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
