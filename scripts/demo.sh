#!/usr/bin/env bash
# The demo: real digits, DiffMoE with 8 experts over 2 ranks (EP 2) on DeepSpeed, images, and a judge.
# No GPU, no download.  Run again, it resumes from its newest checkpoint; `rm -r runs/demo` starts afresh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=runs/demo
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Ranks find each other through a file: no port to collide with another run on this machine.
export DIFFMOE_STORE="$scratch/ranks"
# Two ranks need two GPUs; with fewer the CPU does it.
[ "$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" -ge 2 ] || export DS_ACCELERATOR=cpu

ranks() { rm -f "$DIFFMOE_STORE"; deepspeed --log_level error --num_gpus 2 run.py "$@"; }

python -m diffmoe.data.digits data/digits
ranks --deepspeed_config ds_configs/zero1_fp32.json --config configs/demo.yaml run.folder="$run" "$@"
ranks sample --checkpoint "$run" --classes all --count 500 --out "$run/digits"
echo "images: $run/digits.png  $run/loss.png  $run/expert_load.png"
python -m diffmoe.evaluation.judge "$run/digits.npz" --json "$run/judge.json" --require
