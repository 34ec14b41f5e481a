#!/usr/bin/env bash
# H2: AdvDMD, 4 steps, mini-sd3, against its teacher and DMD2 at 4 steps on mini-geneval.
ITERATIONS=${ITERATIONS:-702} exec "$(dirname "$0")/run_claim.sh" h2 mini-sd3
