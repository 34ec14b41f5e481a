#!/usr/bin/env bash
# Runs broken on purpose, for the doctor to find: python runs/bands.py puts what it says of them into docs/health.md.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin} iterations=${ITERATIONS:-60}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
run() { # NAME CHANGES
  local name=$1
  shift
  "$bin/advdmd" train mini-sd35-advdmd "iterations=$iterations" save_every=0 sample_every=0 "$@" --out "runs/broken/$name" || true
  mkdir -p "results/broken/$name"
  cp "runs/broken/$name/recipe.yaml" "runs/broken/$name/metrics.jsonl" "results/broken/$name/"
}
run hasty_student dm_optimizer.lr=0.03
run lagging_fake fake_score_optimizer.lr=1e-5
run wild_critic discriminator_lr_scale=50 trunk_lr_scale=5
run blind_critic discriminator_lr_scale=1e-4 trunk_lr_scale=1e-4
