#!/usr/bin/env bash
# The demo: real digits, DiffMoE with 8 experts over 2 ranks (EP 2) on DeepSpeed, images, and a judge.
# No GPU, no download.  Run again, it resumes from its newest checkpoint; `rm -r runs/demo` starts afresh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/two_ranks.sh"
run=runs/demo

python -m diffmoe.data.digits data/digits
ranks --deepspeed_config ds_configs/zero1_fp32.json --config configs/demo.yaml run.folder="$run" "$@"
ranks sample --checkpoint "$run" --classes all --count 500 --out "$run/digits"
echo "images: $run/digits.png  $run/loss.png  $run/expert_load.png"
python -m diffmoe.evaluation.judge "$run/digits.npz" --json "$run/judge.json" --require
