"""What is kept of a run: python runs/keep.py RUN SCORES KEPT

Recipe, metrics (every tenth line, and those with an exam), the last sheet of samples, and scores.json of each evaluation.
"""

import json
import shutil
import sys
from pathlib import Path


def main() -> None:
    run, scores, kept = map(Path, sys.argv[1:4])
    kept.mkdir(parents=True, exist_ok=True)
    if (run / "recipe.yaml").is_file():
        shutil.copy(run / "recipe.yaml", kept)
        shutil.copy(max((run / "samples").glob("step-*.png")), kept / "samples.png")
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (kept / "metrics.jsonl").write_text("".join(s for s in lines if json.loads(s)["step"] % 10 == 0 or "eval/" in s))
    for file in scores.glob("*/scores.json"):
        shutil.copy(file, kept / f"{file.parent.name}.json")


if __name__ == "__main__":
    main()
