#!/usr/bin/env bash
# The wheel in a clean environment: built, installed with the pinned versions, run from another folder; and a bill of materials of
# what is installed then. Writes results/reliability/wheel.json and results/reliability/sbom.cdx.json. PYTHON may name another interpreter.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd) here=$(mktemp -d) python=${PYTHON:-python3.11}
trap 'rm -rf "$here"' EXIT
cd "$here"
"$python" -m venv tools
"$python" -m venv clean
tools/bin/pip install -q cyclonedx-bom
tools/bin/pip wheel -q --no-deps -w . "$root"
clean/bin/pip install -q -c "$root/constraints.txt" torch
clean/bin/pip install -q -c "$root/constraints.txt" advdmd-*.whl
clean/bin/pip check
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONPATH=
clean/bin/advdmd show mini-sd35-advdmd >/dev/null
clean/bin/advdmd sample mini-qwen "a picture of a red circle" --out pictures >/dev/null
clean/bin/advdmd train mini-sd35-advdmd iterations=2 prompts_per_step=2 data.num_prompts=8 sample_every=0 --out run >/dev/null 2>&1
clean/bin/advdmd eval run/student mini-geneval --images 2 --prompts 2 --out scores --threads 1 >/dev/null 2>&1
clean/bin/advdmd export run --out student >/dev/null
tools/bin/cyclonedx-py environment clean --of JSON --output-reproducible -o sbom.cdx.json
clean/bin/python - "$root" <<'END'
import hashlib, json, subprocess, sys
from importlib.metadata import distributions
from pathlib import Path
root, wheel = Path(sys.argv[1]), next(Path().glob("advdmd-*.whl"))
pins = dict(x.split("==") for x in (root / "constraints.txt").read_text().split("\n") if "==" in x)
there = {d.name.lower().replace("_", "-"): d.version.partition("+")[0] for d in distributions()}
bill = json.loads(Path("sbom.cdx.json").read_text())
record = {
    "commit": subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
    "wheel": wheel.name,
    "megabytes": round(wheel.stat().st_size / 2**20, 1),
    "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
    "packages": len(there),
    "other_than_pinned": sorted(k for k, v in there.items() if k in pins and pins[k].partition("+")[0] != v),
    "without_a_pin": sorted(k for k in there if k not in pins),
    "bill_of_materials": len(bill["components"]),
    "ran": ["show", "sample", "train", "eval", "export"],
}
(root / "results/reliability/wheel.json").write_text(json.dumps(record, indent=1) + "\n")
(root / "results/reliability/sbom.cdx.json").write_text(Path("sbom.cdx.json").read_text())
print(json.dumps(record, indent=1))
END
