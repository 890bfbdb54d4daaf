#!/usr/bin/env bash
#SBATCH --job-name=diffmoe-sample
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Images from a checkpoint, on one node of 8 GPUs (run.py sample --help). From the repository's root:
#   sbatch scripts/slurm/sample.sh --checkpoint runs/l_e16 --vae FOLDER --classes 207,360 --count 64 --out runs/l_e16/images
set -euo pipefail
root=${DIFFMOE_ROOT:-${SLURM_SUBMIT_DIR:?is unset: start this with sbatch}}
# shellcheck source=scripts/slurm/_common.sh
source "$root/scripts/slurm/_common.sh"
run_verb sample "$@"
