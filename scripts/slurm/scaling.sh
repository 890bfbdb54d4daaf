#!/usr/bin/env bash
#SBATCH --job-name=diffmoe-scaling
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
# A scaling benchmark over 1, 2, ... all of the job's nodes (python -m launcher scaling --help): table and plots in
# runs/scaling-JOB. Each measured run is a step of this job. From the repository's root:
#   sbatch --nodes=8 scripts/slurm/scaling.sh [options] [key=value ...]
set -euo pipefail
root=${DIFFMOE_ROOT:-${SLURM_SUBMIT_DIR:?is unset: start this with sbatch}}
# shellcheck source=scripts/slurm/_common.sh
source "$root/scripts/slurm/_common.sh"
enter_repository
python -m launcher scaling --config "${DIFFMOE_CONFIG:-configs/diffmoe_l_e16_flow.yaml}" \
  --deepspeed_config "${DIFFMOE_DEEPSPEED_CONFIG:-ds_configs/zero1_bf16.json}" --out "runs/scaling-$SLURM_JOB_ID" --per-node "$tasks" "$@"
