#!/usr/bin/env bash
# H3: AdvDMD, 2 steps, mini-qwen, against TwinFlow and DMD2 at 2 steps on both suites; STEPS=1 or 4: the same at so many.
steps=${STEPS:-2} name=h3
[ "$steps" = 2 ] || name=h3-$steps-step
METHODS=${METHODS:-advdmd twinflow dmd2} STEPS=$steps ITERATIONS=${ITERATIONS:-600} exec "$(dirname "$0")/claim.sh" "$name" mini-qwen
