#!/usr/bin/env bash
# What each part of AdvDMD is worth: the main job's recipe on mini-sd35 with one thing changed, at equal forwards; a change that
# costs less runs longer, its schedule stretched with it. DMD and DMD2 are in the claims. The last student is scored, not the best
# of its validations: that may be from before the first policy update, and then tells nothing of what comes after it. Resumable:
# what KEPT has is not done again. SEEDS, ONLY (names; those after no_wrong_captions are left out by default), ITERATIONS (of the
# recipe), KEPT (under results) and BIN may be set.
set -euo pipefail
cd "$(dirname "$0")/.."
seeds=${SEEDS:-0 1} iterations=${ITERATIONS:-300} bin=${BIN:-.venv/bin} recipe=mini-sd35-advdmd
# The kept runs have the discriminator that was the recipe's then.
base=(algorithm.discriminator_every_nth_sample=1 "discriminator.feature_depths=[0.25,0.5,0.75,1.0]")
work=runs/ablations kept=results/${KEPT:-ablations} commit=${COMMIT:-$(git rev-parse --short HEAD)}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
mkdir -p "$work/comparisons" "$kept"
"$bin/python" runs/archive_run.py unpack "$kept" "$work/scores"
declare -A change=(
  [recipe]=""
  [final_reward_only]="algorithm.credit=final"
  [step_reward_only]="algorithm.credit=step"
  [frozen_discriminator]="algorithm.discriminator_online=false"
  [no_gate]="algorithm.auc_gating=false"
  [no_dm_only]="algorithm.dm_only_iterations=0"
  [eta_.9]="algorithm.eta=0.9"
  [no_policy]="algorithm.dm_only_iterations=99999"
  [policy_without_gan]="algorithm.gan_loss_weight=0"
  [no_wrong_captions]="algorithm.mismatched_caption_weight=0"
  [discriminator_on_the_teacher]="discriminator.trunk=teacher"
  [action_sample]="algorithm.action=sample"
  [own_starts]="algorithm.shared_start=false"
  [steps_1]="algorithm.steps=1"
  [steps_2]="algorithm.steps=2"
  [steps_8]="algorithm.steps=8"
)
order="recipe no_policy own_starts no_gate final_reward_only step_reward_only policy_without_gan frozen_discriminator
  no_wrong_captions"
names="recipe ${ONLY:-${order#recipe }}" # every change is compared to the recipe
suites=(mini-geneval-test mini-dpg-test)
complete() { # RUN: whether both suites are scored
  local suite; for suite in "${suites[@]}"; do [ -f "$work/scores/$1/$suite/scores.json" ] || return 1; done
}
for seed in $seeds; do
  for name in $names; do
    run=$work/$name-$seed scores=$work/scores/$name-$seed
    read -ra words <<<"${change[$name]}"
    words=("${base[@]}" "${words[@]}")
    n=$("$bin/python" runs/match_budget.py "$recipe" "${base[@]}" "iterations=$iterations" -- "$recipe" "${words[@]}")
    what=("$recipe" "${words[@]}" "iterations=$n" "seed=$seed" eval_every=100)
    if complete "$name-$seed"; then
      "$bin/python" runs/check_recipe.py "$kept/$name-$seed/recipe.yaml" "${what[@]}"
      continue
    fi
    "$bin/advdmd" train "${what[@]}" --out "$run" >/dev/null
    "$bin/advdmd" export "$run" --out "$run-last" --overwrite eval_every=0 >/dev/null
    for job in "mini-geneval 192 96" "mini-dpg 384 384"; do
      read -r suite images prompts <<<"$job"
      [ -f "$scores/$suite-test/scores.json" ] ||
        "$bin/advdmd" eval "$run-last" "$suite" --images "$images" --prompts "$prompts" --out "$scores/$suite-test" --threads 1 >/dev/null
    done
    "$bin/python" runs/archive_run.py run "$run" "$scores" "$kept/$name-$seed"
  done
done
for name in $names; do
  for suite in "${suites[@]}"; do
    ours=() theirs=()
    for seed in $seeds; do
      ours+=("$work/scores/$name-$seed/$suite/scores.json") theirs+=(--against "$work/scores/recipe-$seed/$suite/scores.json")
    done
    "$bin/advdmd" compare "${ours[@]}" "${theirs[@]}" --commit "$commit" --out "$work/comparisons/${suite%-test}-$name.json"
  done
done
"$bin/python" runs/archive_run.py comparisons "$work/comparisons" "$kept"
