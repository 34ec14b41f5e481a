#!/usr/bin/env bash
# H1: AdvDMD, 4 steps, mini-sd35, against its teacher at 40 guided steps on mini-dpg.
exec "$(dirname "$0")/run_claim.sh" h1 mini-sd35
