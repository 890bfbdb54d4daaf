#!/usr/bin/env bash
#SBATCH --job-name=diffmoe-compare
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
# A comparison (run.py compare --help), a run a task of the array; begun again, a run goes on. Runs of several ranks (ranks: 8 in the
# YAML) have as many GPUs of one node: sbatch --gpus-per-node=8. From the repository's root:
#   python run.py compare --config configs/compare/fashion14.yaml --list                           # the runs by number
#   sbatch --array=0-33 scripts/slurm/compare.sh --config configs/compare/fashion14.yaml
#   python run.py compare --config configs/compare/fashion14.yaml --table                          # the table of what there is
set -euo pipefail
root=${DIFFMOE_ROOT:-${SLURM_SUBMIT_DIR:?is unset: start this with sbatch}}
# shellcheck source=scripts/slurm/_common.sh
source "$root/scripts/slurm/_common.sh"
: "${SLURM_ARRAY_TASK_ID:?is unset: start this with sbatch --array=0-N, as run.py compare --list counts}"
enter_repository
job=$PWD/runs/jobs/$SLURM_JOB_NAME-$SLURM_JOB_ID code=$PWD
mkdir -p "$job/logs"
run=$(python run.py compare "$@" --task "$SLURM_ARRAY_TASK_ID" --list | awk -F' *[|] *' 'NR == 3 { print $5 }')
say "run.py compare $*, run $run, logs in $job/logs"
# One process, which starts the run's ranks by itself.
step=(srun --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --cpu-bind=none --kill-on-bad-exit=0 --wait=60)
on_ranks python run.py compare "$@" --task "$SLURM_ARRAY_TASK_ID"
conclude --out "$run"
