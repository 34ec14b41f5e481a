#!/usr/bin/env bash
# What policy updates are worth: a student of TEACHER without any is trained, then goes on in two ways with the same forwards:
# with policy updates on the forward process (forward), or without (none). checker: the exact checker as the only reward, the
# upper bound of any. Resumable: what results/reinforce-TEACHER has is not done again. TEACHER, SEEDS, ARMS and BIN may be set;
# RUNS_ONLY=1 leaves out the comparisons, so that several processes can work on it. ITERATIONS, 800 by default, of the arms with
# policy updates; other numbers go to results/reinforce-TEACHER-ITERATIONS.
set -euo pipefail
cd "$(dirname "$0")/.."
seeds=${SEEDS:-0 1 2} arms=${ARMS:-forward none} bin=${BIN:-.venv/bin} teacher=${TEACHER:-mini-sd3}
iterations=${ITERATIONS:-800}
every=$((iterations > 800 ? 100 : 60)) name=reinforce-$teacher$([ "$iterations" = 800 ] || echo "-$iterations")
work=runs/$name kept=results/$name commit=${COMMIT:-$(git rev-parse --short HEAD)}
suites=(mini-geneval-test mini-dpg-test)
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
mkdir -p "$work/comparisons" "$kept"
"$bin/python" runs/archive_run.py unpack "$kept" "$work/scores"

finish() { # RUN MODEL: score a model, also one that was trained on the checker, and keep the run
  for job in "mini-geneval 192 96" "mini-dpg 768 384"; do
    read -r suite images prompts <<<"$job"
    [ -f "$work/scores/$1/$suite-test/scores.json" ] ||
      "$bin/advdmd" eval "$2" "$suite" --images "$images" --prompts "$prompts" --out "$work/scores/$1/$suite-test" \
        --threads 1 --allow-training-reward >/dev/null
  done
  "$bin/python" runs/archive_run.py run "$work/$1" "$work/scores/$1" "$kept/$1"
}

for seed in $seeds; do
  if [ ! -d "$work/base-$seed/student" ]; then
    "$bin/advdmd" train "$teacher-advdmd-long" iterations=500 algorithm.dm_only_iterations=99999 "seed=$seed" eval_every=100 \
      eval_images=96 --out "$work/base-$seed" >/dev/null
  fi
  [ -d "$kept/base-$seed" ] || finish "base-$seed" "$work/base-$seed/student"
  for arm in $arms; do
    [ -d "$kept/$arm-$seed" ] && continue
    common=("student=$work/base-$seed/student" "seed=$((seed + 10))" "eval_every=$every" eval_images=96 algorithm.warmup_iterations=200)
    what=("$teacher-advdmd-reinforce" "${common[@]}" "iterations=$iterations" algorithm.dm_only_iterations=200)
    case $arm in
      forward) ;;
      none) # distribution matching and GAN alone, an update of the student in every iteration after the same warm-up; 24 forwards
        # an iteration, with policy updates 26
        what=("$teacher-advdmd-long" "${common[@]}" "iterations=$(((iterations - 200) * 13 / 12 + 200))"
          algorithm.dm_only_iterations=99999 algorithm.policy_ramp_iterations=0 algorithm.dm_every=1 algorithm.dm_updates=1 algorithm.discriminator_every_nth_sample=1
          dm_optimizer.lr=2e-4 dm_optimizer.decay_steps=0 policy_optimizer.lr=3e-4 "policy_optimizer.betas=[0.8,0.999]"
          policy_optimizer.decay_steps=0) ;;
      checker) what+=(algorithm.discriminator_reward_weight=0 "rewards=[1*checker]") ;;
      *) echo "ARMS: forward, none, checker; not $arm" >&2 && exit 2 ;;
    esac
    "$bin/advdmd" train "${what[@]}" --out "$work/$arm-$seed" >/dev/null
    finish "$arm-$seed" "$work/$arm-$seed/student"
  done
done
[ -z "${RUNS_ONLY:-}" ] || exit 0
grep -q '"run": "teacher"' "$kept/scores.jsonl" || finish teacher "$teacher"
for suite in "${suites[@]}"; do
  files() { for seed in $seeds; do echo "$work/scores/$1-$seed/$suite/scores.json"; done; }
  for arm in $arms; do
    for other in base none; do
      [ "$arm" = "$other" ] || "$bin/advdmd" compare $(files "$arm") $(files "$other" | sed 's/^/--against /') --commit "$commit" \
        --out "$work/comparisons/$suite-$arm-$other.json"
    done
    "$bin/advdmd" compare $(files "$arm") --against "$work/scores/teacher/$suite/scores.json" --commit "$commit" \
      --out "$work/comparisons/$suite-$arm-teacher.json"
  done
done
"$bin/python" runs/archive_run.py comparisons "$work/comparisons" "$kept"
