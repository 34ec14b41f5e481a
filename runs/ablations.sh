#!/usr/bin/env bash
# What each part of AdvDMD is worth: the main job's recipe on mini-sd35 with one thing changed, at equal forwards; a change that
# costs less runs longer, its schedule stretched with it. DMD and DMD2 are in the claims.
# The results kept are of the recipe before, whose policy turns began after two thirds: move them away to begin anew.
# Resumable: what results/ablations has is not done again. SEEDS, ONLY (names), ITERATIONS (of the recipe) and BIN may be set.
set -euo pipefail
cd "$(dirname "$0")/.."
seeds=${SEEDS:-0 1} iterations=${ITERATIONS:-300} bin=${BIN:-.venv/bin} recipe=mini-sd35-advdmd
work=runs/ablations kept=results/ablations commit=${COMMIT:-$(git rev-parse --short HEAD)}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
mkdir -p "$work" "$kept"
declare -A change=(
  [recipe]=""
  [final_reward_only]="algorithm.credit=final"
  [step_reward_only]="algorithm.credit=step"
  [frozen_critic]="algorithm.discriminator_online=false"
  [no_gate]="algorithm.auc_gating=false"
  [no_warmup]="algorithm.dm_only_iterations=0"
  [eta_.9]="algorithm.eta=0.9"
  [no_policy]="algorithm.dm_only_iterations=99999"
  [policy_without_gan]="algorithm.gan_loss_weight=0"
  [no_wrong_captions]="algorithm.mismatched_caption_weight=0"
  [critic_on_the_teacher]="discriminator.trunk=teacher"
  [action_landed]="algorithm.action=sample"
  [steps_1]="algorithm.steps=1"
  [steps_2]="algorithm.steps=2"
  [steps_8]="algorithm.steps=8"
)
order="recipe final_reward_only step_reward_only frozen_critic no_gate no_warmup eta_.9 no_policy policy_without_gan
  no_wrong_captions critic_on_the_teacher action_landed steps_1 steps_2 steps_8"
names="recipe ${ONLY:-${order#recipe }}" # every change is compared to the recipe
suites=(mini-geneval mini-dpg)
complete() { # KEPT: whether both suites are scored there
  local suite; for suite in "${suites[@]}"; do [ -f "$1/$suite.json" ] || return 1; done
}
for seed in $seeds; do
  for name in $names; do
    run=$work/$name-$seed scores=$work/scores/$name-$seed
    read -ra words <<<"${change[$name]}"
    n=$("$bin/python" runs/equal.py "$recipe" "iterations=$iterations" -- "$recipe" "${words[@]}")
    what=("$recipe" "${words[@]}" "iterations=$n" "seed=$seed" eval_every=100)
    if complete "$kept/$name-$seed"; then
      "$bin/python" runs/same.py "$kept/$name-$seed/recipe.yaml" "${what[@]}"
      continue
    fi
    "$bin/advdmd" train "${what[@]}" --out "$run" >/dev/null
    for job in "mini-geneval 192 96" "mini-dpg 384 384"; do
      read -r suite images prompts <<<"$job"
      [ -f "$scores/$suite/scores.json" ] ||
        "$bin/advdmd" eval "$run/student" "$suite" --images "$images" --prompts "$prompts" --out "$scores/$suite" --threads 1 >/dev/null
    done
    "$bin/python" runs/keep.py "$run" "$scores" "$kept/$name-$seed"
  done
done
for name in $names; do
  for suite in "${suites[@]}"; do
    ours=() theirs=()
    for seed in $seeds; do
      ours+=("$kept/$name-$seed/$suite.json") theirs+=(--against "$kept/recipe-$seed/$suite.json")
    done
    "$bin/advdmd" compare "${ours[@]}" "${theirs[@]}" --commit "$commit" --out "$kept/$suite-$name.json"
  done
done
