#!/usr/bin/env bash
# Good runs of every algorithm, whose metrics give the ranges of `advdmd doctor`: runs/healthy_runs.sh, about 90 minutes on one
# core. Then python runs/healthy_ranges.py. Resumable; BIN may name where advdmd is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
run() { # NAME RECIPE CHANGES
  local name=$1
  shift
  "$bin/advdmd" train "$@" threads=1 --out "runs/healthy/$name" >/dev/null
  "$bin/python" runs/archive_run.py run "runs/healthy/$name" "runs/healthy/$name/scores" "results/healthy/$name"
}
run advdmd-mini-sd35 mini-sd35-advdmd eval_every=145
run dmd2-mini-sd35 mini-sd35-dmd2 eval_every=215
run twinflow-mini-sd35 mini-sd35-twinflow eval_every=325
run advdmd-mini-sd35-2step mini-sd35-advdmd algorithm.steps=2 eval_every=145
run advdmd-mini-sd3-long mini-sd3-advdmd-long iterations=702 eval_every=100
run dmd2-mini-sd3-long mini-sd3-dmd2-long iterations=807 eval_every=100
run twinflow-mini-sd3 mini-sd3-twinflow
