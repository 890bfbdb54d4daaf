#!/usr/bin/env bash
#SBATCH --job-name=diffmoe-encode
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
# Images to VAE moments in shards, on one node of 8 GPUs (run.py encode --help); begun again, it goes on. From the repository's root:
#   sbatch scripts/slurm/encode.sh --source imagenet/train --image-size 256 --vae FOLDER --out data/imagenet256_latents
set -euo pipefail
root=${DIFFMOE_ROOT:-${SLURM_SUBMIT_DIR:?is unset: start this with sbatch}}
# shellcheck source=scripts/slurm/_common.sh
source "$root/scripts/slurm/_common.sh"
run_verb encode "$@"
