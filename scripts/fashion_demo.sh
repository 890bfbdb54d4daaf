#!/usr/bin/env bash
# The second demo: clothing by class at 28 x 28, DiffMoE with 8 experts over 2 ranks (EP 2), images, and a judge.
# Run again, it resumes from its newest checkpoint; `rm -r runs/fashion` starts afresh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=runs/fashion
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Ranks find each other through a file: no port to collide with another run on this machine.
export DIFFMOE_STORE="$scratch/ranks"
# Two ranks need two GPUs; with fewer the CPU does it.
[ "$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" -ge 2 ] || export DS_ACCELERATOR=cpu

ranks() { rm -f "$DIFFMOE_STORE"; deepspeed --log_level error --num_gpus 2 run.py "$@"; }

bash scripts/fashion.sh
ranks --deepspeed_config ds_configs/zero1_fp32.json --config configs/fashion.yaml run.folder="$run" "$@"
ranks sample --checkpoint "$run" --classes all --count 1000 --out "$run/clothing"
echo "images: $run/clothing.png  $run/loss.png  $run/expert_load.png"
python -m diffmoe.evaluation.judge "$run/clothing.npz" --train data/fashion/train --held-out data/fashion/test \
    --json "$run/judge.json" --require
