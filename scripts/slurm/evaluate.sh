#!/usr/bin/env bash
#SBATCH --job-name=diffmoe-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# FID and its companions, on one node of 8 GPUs (run.py evaluate --help); begun again, it goes on. From the repository's root, by the
# published protocol (without --published: as the run's own section sample says, and the card says what differs):
#   sbatch scripts/slurm/evaluate.sh --published --checkpoint runs/l_e16 --vae FOLDER --reference R.npz --extractor E.pt --out runs/l_e16/fid50k
set -euo pipefail
root=${DIFFMOE_ROOT:-${SLURM_SUBMIT_DIR:?is unset: start this with sbatch}}
# shellcheck source=scripts/slurm/_common.sh
source "$root/scripts/slurm/_common.sh"
run_verb evaluate "$@"
