#!/usr/bin/env bash
# H3: AdvDMD, 2 steps, mini-qwen, against TwinFlow and DMD2 at 2 steps on both suites; STEPS=1 or 4: the same at so many;
# TEACHER=mini-sd35: the same with another teacher.
steps=${STEPS:-2} teacher=${TEACHER:-mini-qwen} name=h3
[ "$teacher" = mini-qwen ] || name=$name-$teacher
[ "$steps" = 2 ] || name=$name-$steps-step
export METHODS=${METHODS:-advdmd twinflow dmd2 dmd2_paper} STEPS=$steps ITERATIONS=${ITERATIONS:-180}
exec "$(dirname "$0")/run_claim.sh" "$name" "$teacher"
