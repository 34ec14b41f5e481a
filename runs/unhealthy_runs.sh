#!/usr/bin/env bash
# Runs made to fail, which `advdmd doctor` must find: runs/unhealthy_runs.sh, then python runs/healthy_ranges.py.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin} iterations=${ITERATIONS:-60}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
run() { # NAME CHANGES
  local name=$1
  shift
  "$bin/advdmd" train mini-sd35-advdmd "iterations=$iterations" save_every=0 sample_every=0 threads=1 "$@" \
    --out "runs/unhealthy/$name" || true
  mkdir -p "results/unhealthy/$name"
  cp "runs/unhealthy/$name/recipe.yaml" "runs/unhealthy/$name/metrics.jsonl" "results/unhealthy/$name/"
}
run student_learning_rate_too_high dm_optimizer.lr=0.03
run fake_score_learning_rate_too_low fake_score_optimizer.lr=1e-5
run discriminator_learning_rate_too_high discriminator_lr_scale=50 trunk_lr_scale=5
run discriminator_learning_rate_too_low discriminator_lr_scale=1e-4 trunk_lr_scale=1e-4
