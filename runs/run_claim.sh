#!/usr/bin/env bash
# One claim of the miniature: students of a teacher over training seeds, scored beside it, compared pair by pair.
#   runs/run_claim.sh NAME TEACHER
# Everything is resumable: what results/claims/NAME has is not done again; a stopped run continues in runs/NAME. DMD2 (two updates
# of the student on a trajectory; dmd2_paper: its paper's five updates of the fake score to one), DMD (DMD2 without its GAN),
# TwinFlow and AdvDMD without policy updates get as many iterations as cost AdvDMD's forwards.
# SEEDS, METHODS, STEPS, ITERATIONS (of AdvDMD) and BIN (where advdmd is installed) may be set. RUNS_ONLY=1 leaves out the teacher
# and the comparisons, so that several processes can work on one claim.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 teacher=$2
seeds=${SEEDS:-0 1 2} methods=${METHODS:-advdmd dmd2 dmd2_paper} iterations=${ITERATIONS:-700} steps=${STEPS:-4}
bin=${BIN:-.venv/bin} work=runs/$name kept=results/claims/$name commit=${COMMIT:-$(git rev-parse --short HEAD)}
suites=(mini-geneval-test mini-dpg-test mini-dpg-pairs)
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
mkdir -p "$work/comparisons" "$kept"
"$bin/python" runs/archive_run.py unpack "$kept" "$work/scores"

complete() { # RUN: whether all suites are scored
  local suite; for suite in "${suites[@]}"; do [ -f "$work/scores/$1/$suite/scores.json" ] || return 1; done
}

score() { # MODEL FOLDER: both suites on held-out prompts, and the dense one on held-out shape x colour pairs
  for job in "mini-geneval test 192 96" "mini-dpg test 768 384" "mini-dpg pairs 768 384"; do
    read -r suite split images prompts <<<"$job"
    [ -f "$2/$suite-$split/scores.json" ] ||
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
      dmd2_paper) what=("$teacher-dmd2-paper-long") ;;
      dmd) what=("$teacher-dmd2-long" algorithm.gan_loss_weight=0) ;;
      no_policy) what=("$teacher-advdmd-long" algorithm.dm_only_iterations=99999) ;;
      twinflow) what=("$teacher-twinflow" "algorithm.last_time=$([ "$steps" = 4 ] && echo .5 || echo .6)") ;;
      *) echo "METHODS: advdmd, dmd2, dmd2_paper, dmd, twinflow, no_policy; not $method" >&2 && exit 2 ;;
    esac
    what+=("algorithm.steps=$steps")
    n=$("$bin/python" runs/match_budget.py "$teacher-advdmd-long" "algorithm.steps=$steps" "iterations=$iterations" -- "${what[@]}")
    what+=("iterations=$n" "seed=$seed" eval_every=100)
    if complete "$method-$seed" && [ -d "$kept/$method-$seed" ]; then
      "$bin/python" runs/check_recipe.py "$kept/$method-$seed/recipe.yaml" "${what[@]}"
      continue
    fi
    "$bin/advdmd" train "${what[@]}" --out "$run" >/dev/null
    score "$run/student" "$work/scores/$method-$seed"
    "$bin/python" runs/archive_run.py run "$run" "$work/scores/$method-$seed" "$kept/$method-$seed"
  done
done
[ -z "${RUNS_ONLY:-}" ] || exit 0
if ! complete teacher; then
  score "$teacher" "$work/scores/teacher"
  "$bin/python" runs/archive_run.py run "$teacher" "$work/scores/teacher" "$kept/teacher"
fi
for what in "${suites[@]}"; do
  files() { for seed in $seeds; do echo "$work/scores/$1-$seed/$what/scores.json"; done; }
  for method in $methods; do
    "$bin/advdmd" compare $(files "$method") --against "$work/scores/teacher/$what/scores.json" --commit "$commit" \
      --out "$work/comparisons/$what-$method-teacher.json"
    [ "$method" = advdmd ] || "$bin/advdmd" compare $(files advdmd) $(files "$method" | sed 's/^/--against /') \
      --commit "$commit" --out "$work/comparisons/$what-advdmd-$method.json"
  done
done
"$bin/python" runs/archive_run.py comparisons "$work/comparisons" "$kept"
