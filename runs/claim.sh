#!/usr/bin/env bash
# One claim of the miniature: students of a teacher over training seeds, scored beside it, compared pair by pair.
#   runs/claim.sh NAME TEACHER
# Everything is resumable: what is done is not done again. Work goes to runs/NAME, what is kept to results/NAME.
# SEEDS, METHODS and BIN (where advdmd is installed) may be set. DMD2 and DMD (the same without its GAN) get as
# many iterations as cost AdvDMD's forwards.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 teacher=$2
seeds=${SEEDS:-0 1 2} methods=${METHODS:-advdmd dmd2 dmd}
bin=${BIN:-.venv/bin} work=runs/$name kept=results/$name commit=$(git rev-parse --short HEAD)
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
mkdir -p "$work" "$kept"

score() { # MODEL FOLDER: both suites on held-out prompts, and the dense one on held-out shape x colour pairs
  for job in "mini-geneval test 192 96" "mini-dpg test 768 384" "mini-dpg pairs 768 384"; do
    read -r suite split images prompts <<<"$job"
    [ -f "$2/$suite-$split/table.json" ] ||
      "$bin/advdmd" eval "$1" "$suite" --split "$split" --images "$images" --prompts "$prompts" --out "$2/$suite-$split" \
        --threads 1 >/dev/null
  done
}

for seed in $seeds; do
  for method in $methods; do
    run=$work/$method-$seed
    case $method in
      advdmd) what=("$teacher-advdmd-long") ;;
      dmd2) what=("$teacher-dmd2-long") ;;
      dmd) what=("$teacher-dmd2-long" algorithm.gan=0) ;;
      *) echo "METHODS: advdmd, dmd2, dmd; not $method" >&2 && exit 2 ;;
    esac
    n=$("$bin/python" runs/equal.py "$teacher-advdmd-long" -- "${what[@]}")
    "$bin/advdmd" train "${what[@]}" "iterations=$n" "seed=$seed" exam_every=150 --out "$run" >/dev/null
    score "$run/student" "$work/scores/$method-$seed"
    mkdir -p "$kept/$method-$seed"
    cp "$run/recipe.yaml" "$run/metrics.jsonl" "$kept/$method-$seed/"
    cp "$run/samples/$(printf 'step-%06d.png' "$n")" "$kept/$method-$seed/samples.png"
  done
done
score "$teacher" "$work/scores/teacher"
for what in mini-geneval-test mini-dpg-test mini-dpg-pairs; do
  folders() { for seed in $seeds; do echo "$work/scores/$1-$seed/$what"; done; }
  for method in $methods; do
    "$bin/advdmd" compare $(folders "$method") --against "$work/scores/teacher/$what" --commit "$commit" --out "$kept/$what-$method-teacher.json"
    [ "$method" = advdmd ] || "$bin/advdmd" compare $(folders advdmd) $(folders "$method" | sed 's/^/--against /') --commit "$commit" --out "$kept/$what-advdmd-$method.json"
  done
done
