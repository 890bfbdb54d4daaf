#!/usr/bin/env bash
# The second demo: clothing by class at 28 x 28, DiffMoE with 8 experts over 2 ranks (EP 2), images, and a judge.
# Run again, it resumes from its newest checkpoint; `rm -r runs/fashion` starts afresh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/two_ranks.sh"
run=runs/fashion

bash scripts/fashion.sh
ranks --deepspeed_config ds_configs/zero1_fp32.json --config configs/fashion.yaml run.folder="$run" "$@"
ranks sample --checkpoint "$run" --classes all --count 1000 --out "$run/clothing"
echo "images: $run/clothing.png  $run/loss.png  $run/expert_load.png"
python -m diffmoe.evaluation.judge "$run/clothing.npz" --train data/fashion/train --held-out data/fashion/test \
    --json "$run/judge.json" --require
