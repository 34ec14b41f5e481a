"""What is kept of runs and evaluations in results/.

    python runs/archive_run.py run RUN SCORES KEPT        a run as KEPT, its evaluations as lines of KEPT/../scores.jsonl
    python runs/archive_run.py unpack FOLDER SCORES       FOLDER/scores.jsonl back to SCORES/RUN/SUITE-SPLIT/scores.json
    python runs/archive_run.py comparisons WORK FOLDER    every comparison in WORK, as FOLDER/comparisons.json

Of a run: the recipe, every tenth line of the metrics and those with a validation, and the last sample grid of AdvDMD at
seed 0.
"""

import json
import shutil
import sys
from pathlib import Path


def archive_run(run: Path, scores: Path, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    if (run / "recipe.yaml").is_file():
        kept.mkdir(exist_ok=True)
        shutil.copy(run / "recipe.yaml", kept)
        grids = sorted((run / "samples").glob("step-*.png"))
        if grids and kept.name == "advdmd-0":
            shutil.copy(grids[-1], kept / "samples.png")
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (kept / "metrics.jsonl").write_text("".join(s for s in lines if json.loads(s)["step"] % 10 == 0 or "eval/" in s))
    table = kept.parent / "scores.jsonl"
    old = table.read_text().splitlines(keepends=True) if table.is_file() else []
    old = [line for line in old if json.loads(line)["run"] != kept.name]
    files = sorted(scores.glob("*/scores.json"))
    new = [json.dumps({"run": kept.name, **json.loads(f.read_text())}) + "\n" for f in files]
    if not (old or new):
        return
    table.write_text("".join(sorted([*old, *new], key=lambda line: json.loads(line)["run"])))


def unpack(folder: Path, scores: Path) -> None:
    table = folder / "scores.jsonl"
    for line in table.read_text().splitlines() if table.is_file() else []:
        row = json.loads(line)
        file = scores / row.pop("run") / f"{row['suite']}-{row['split']}" / "scores.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(row))


def comparisons(work: Path, folder: Path) -> None:
    table = folder / "comparisons.json"
    found = json.loads(table.read_text()) if table.is_file() else {}
    found |= {f.stem: json.loads(f.read_text()) for f in sorted(work.glob("*.json"))}
    table.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


if __name__ == "__main__":
    {"run": archive_run, "unpack": unpack, "comparisons": comparisons}[sys.argv[1]](*map(Path, sys.argv[2:]))
