# shellcheck shell=bash
# What the train_*.sh job scripts share: one srun task per GPU, a clean stop before the time limit, requeue.
#
#   sbatch scripts/slurm/train_l_e16.sh [key=value ...]                       from the repository's root
#   sbatch --nodes=4 --gpus-per-node=4 scripts/slurm/train_l_e16.sh train.lr=2e-4
#
# From the environment: DIFFMOE_CONFIG and DIFFMOE_DEEPSPEED_CONFIG (other files than the script's), DIFFMOE_ROOT (the
# repository, when submitted from elsewhere), DIFFMOE_VENV (another environment than the repository's .venv).
#
# The signal before the limit comes to this shell alone (--signal=B:USR1@120). It hands SIGTERM on to the ranks, which
# save and end, and then requeues the job. A SIGTERM from scancel never passes here, so a cancelled job stays cancelled.
# A save that needs longer: sbatch --signal=B:USR1@600.

# train CONFIG [key=value ...]: the rest of the job.
train() {
  local config=${DIFFMOE_CONFIG:-$1} deepspeed_config=${DIFFMOE_DEEPSPEED_CONFIG:-ds_configs/zero1_bf16.json}
  shift
  enter_repository
  local tasks folder arguments=() status=0 step
  tasks=$(tasks_per_node)
  # The job's number survives a requeue: the next start finds this one's checkpoints.
  folder=runs/$SLURM_JOB_NAME-$SLURM_JOB_ID
  [[ " $* " == *" run.folder="* ]] || arguments+=("run.folder=$folder")
  echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $SLURM_JOB_NUM_NODES nodes x $tasks tasks, $config, $deepspeed_config"

  stop_asked=no
  trap ask_to_stop USR1
  # Tasks are counted in full here: the header's --ntasks-per-node does not follow a --gpus-per-node given to sbatch.
  # In the background, because bash runs a trap only while it waits.
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * tasks))" --ntasks-per-node="$tasks" \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
    python run.py --config "$config" --deepspeed_config "$deepspeed_config" "${arguments[@]}" "$@" &
  step=$!
  wait "$step" || status=$?
  while kill -0 "$step" 2>/dev/null; do # the trap ended the wait, not the step
    status=0
    wait "$step" || status=$?
  done

  # A run that had finished by itself just now finds nothing left to do after a requeue.
  if [[ $stop_asked = yes ]] || preempted; then
    echo "job $SLURM_JOB_ID: stopped when asked (status $status), requeued"
    scontrol requeue "$SLURM_JOB_ID"
    return
  fi
  return "$status"
}

# sbatch runs a copy of the script, so where it lies says nothing.
enter_repository() {
  local root=${DIFFMOE_ROOT:-$SLURM_SUBMIT_DIR} venv
  if [[ ! -f $root/run.py ]]; then
    echo "$root has no run.py: submit from the repository's root, or set DIFFMOE_ROOT" >&2
    exit 2
  fi
  cd "$root" || exit 2
  venv=${DIFFMOE_VENV:-$root/.venv}
  if [[ ! -f $venv/bin/activate ]]; then
    echo "$venv has no bin/activate: run make setup, or set DIFFMOE_VENV" >&2
    exit 2
  fi
  # shellcheck disable=SC1091  # made by make setup
  source "$venv/bin/activate"
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} PYTHONUNBUFFERED=1
}

# As many ranks on a node as GPUs; without GPUs (a CPU cluster) as --ntasks-per-node says.
tasks_per_node() {
  local gpus=${SLURM_GPUS_PER_NODE:-0}
  gpus=${gpus##*:} # h200:8
  if [[ ! $gpus =~ ^[0-9]+$ ]]; then
    echo "SLURM_GPUS_PER_NODE ($SLURM_GPUS_PER_NODE) is not a number of GPUs, with or without a type" >&2
    exit 2
  fi
  if ((gpus > 0)); then echo "$gpus"; else echo "${SLURM_NTASKS_PER_NODE:-1}"; fi
}

ask_to_stop() {
  stop_asked=yes
  echo "job $SLURM_JOB_ID: asks the ranks to save and end"
  # The job's one srun is step 0, after a requeue too.
  scancel --signal=TERM "$SLURM_JOB_ID.0" || true
}

# Slurm requeues what it preempts at the end of the grace time, but not a job that has ended cleanly before.
preempted() {
  scontrol show job "$SLURM_JOB_ID" | grep -q '\bPreemptTime=[0-9]'
}
