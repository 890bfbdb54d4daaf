#!/usr/bin/env bash
#SBATCH --job-name=diffmoe-l-e8
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# DiffMoE-L with 8 experts, rectified flow, on two nodes of 8 GPUs. From the repository's root
# (nodes and layout: the planner's for batch 256 on H100s, docs/cluster.md; other nodes: sbatch --nodes=N):
#   sbatch scripts/slurm/train_l_e8.sh [key=value ...]
# Trains in bf16, which is faster; the published rows are fp32 with TF32 matmuls:
#   DIFFMOE_DEEPSPEED_CONFIG=ds_configs/zero1_fp32.json sbatch scripts/slurm/train_l_e8.sh [key=value ...]
set -euo pipefail
root=${DIFFMOE_ROOT:-${SLURM_SUBMIT_DIR:?is unset: start this with sbatch}}
# shellcheck source=scripts/slurm/_common.sh
source "$root/scripts/slurm/_common.sh"
train configs/diffmoe_l_e8_flow.yaml "$@"
