# shellcheck shell=bash
# What the job scripts share: one srun task per GPU, a clean stop before the time limit or a preemption, requeue, logs.
#
#   sbatch scripts/slurm/train_l_e16.sh [key=value ...]                       from the repository's root
#   sbatch --nodes=4 --gpus-per-node=4 scripts/slurm/train_l_e16.sh train.lr=2e-4
#
# From the environment: DIFFMOE_CONFIG and DIFFMOE_DEEPSPEED_CONFIG (other files than the script's), DIFFMOE_PREFLIGHT (no: skip
# it; otherwise options for it), DIFFMOE_ROOT (the repository, when submitted from elsewhere), DIFFMOE_VENV (another
# environment than its .venv), DIFFMOE_CPU_BIND (another --cpu-bind of srun).
#
# The signal before the limit comes to this shell alone (--signal=B:USR1@120; a save that needs longer: sbatch
# --signal=B:USR1@600).  It hands SIGUSR1 on to the ranks, which save and end.  Ranks that ended short of their goal, for
# whatever reason, make the job requeue itself, unless their input was wrong or three starts brought no progress.

layout= # not what the environment may call so

# train CONFIG [key=value ...]: a training job, all of it.  $layout: overrides that go with CONFIG, before those of the
# command line; another configuration (DIFFMOE_CONFIG) has its own.
train() {
  local config=${DIFFMOE_CONFIG:-$1} deepspeed_config=${DIFFMOE_DEEPSPEED_CONFIG:-ds_configs/zero1_bf16.json} folder=() recipe=() overrides=() word
  shift
  [[ -n ${DIFFMOE_CONFIG:-} ]] || read -r -a overrides <<<"$layout"
  for word in "$@"; do
    if [[ $word == --new-recipe ]]; then recipe=("$word"); else overrides+=("$word"); fi
  done
  enter_repository
  # The job's number survives a requeue: the next start finds this one's checkpoints.
  [[ " $* " == *" run.folder="* ]] || folder=("run.folder=runs/$SLURM_JOB_NAME-$SLURM_JOB_ID")
  job=$(python -m launcher job prepare --config "$config" --deepspeed_config "$deepspeed_config" --ranks "$ranks" "${folder[@]}" "${overrides[@]}")
  code=$job/code
  say "$config, $deepspeed_config, logs in $job/logs"
  preflight
  on_ranks python "$code/run.py" --config "$job/config.yaml" --deepspeed_config "$job/deepspeed.json" "${recipe[@]}"
  conclude
}

# run_verb VERB [options]: a job of another subcommand.  evaluate and encode go on from what lies in the folder after --out.
run_verb() {
  local out
  out=$(option --out "$@")
  enter_repository
  job=$PWD/runs/jobs/$SLURM_JOB_NAME-$SLURM_JOB_ID code=$PWD
  mkdir -p "$job/logs"
  say "run.py $*, logs in $job/logs"
  on_ranks python run.py "$@"
  conclude --out "${out:-$([[ $1 == evaluate ]] && echo evaluation || echo samples)}"
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
  trap stop_requested USR1
  count_ranks
  # Without GPUs Slurm binds each task to cores of its own.  With GPUs that would be wrong where tasks leave cores free:
  # Slurm fills the first socket, also with tasks whose GPUs are on the second.  There each rank moves to the cores near
  # its GPU by itself (diffmoe/placement.py).
  local cpu_bind=none
  [[ ${SLURM_GPUS_PER_NODE:-0} != 0 ]] || cpu_bind=cores
  export DIFFMOE_CPU_BIND=${DIFFMOE_CPU_BIND:-$cpu_bind}
  # Tasks are counted in full: the header's --ntasks-per-node does not follow a --gpus-per-node given to sbatch.
  # Ranks of a node are consecutive (block), as EP groups are: these then share a node where they can.
  # No --gpu-bind: every task sees all of the job's GPUs on its node, and takes the one of its number.  NCCL's direct
  # copies between GPUs need both visible: single:1 and closest end them where cgroups hide the others.  none leaves
  # CUDA_VISIBLE_DEVICES unset (Slurm 22.05), and a job that shares its node would take another job's GPUs.
  # Peers of a rank that ended with an error get a minute to end by themselves: killed at once, their code would hide the error's.
  step=(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$ranks" --ntasks-per-node="$tasks"
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --distribution=block:block --cpu-bind="$DIFFMOE_CPU_BIND"
    --kill-on-bad-exit=0 --wait=60)
}

# $tasks ranks a node, $ranks in all: one a GPU; without GPUs (sbatch --gpus-per-node=0) as --ntasks-per-node says.
count_ranks() {
  tasks=${SLURM_GPUS_PER_NODE:-0}
  tasks=${tasks##*:} # h200:8
  [[ $tasks != 0 ]] || tasks=${SLURM_NTASKS_PER_NODE:-1}
  if [[ ! $tasks =~ ^[0-9]+$ ]]; then
    echo "SLURM_GPUS_PER_NODE ($SLURM_GPUS_PER_NODE) is not a number of GPUs, with or without a type" >&2
    exit 2
  fi
  ranks=$((SLURM_JOB_NUM_NODES * tasks))
}

# at_most N: all ranks of the job, but no more than N.
at_most() {
  count_ranks
  echo $((ranks < $1 ? ranks : $1))
}

# Are these nodes fit for it?  Prints which to exclude if not.
preflight() {
  [[ ${DIFFMOE_PREFLIGHT:-} != no ]] || return 0
  local here=$PWD
  # shellcheck disable=SC2086  # options, one a word
  (cd "$code" && "${step[@]}" python -m launcher preflight --config "$job/config.yaml" \
    --deepspeed_config "$job/deepspeed.json" --from "$here" --record "$job/preflight.json" ${DIFFMOE_PREFLIGHT:-})
}

# The signal before the limit: to the ranks.  Where none run yet, none are started.
stop_requested() {
  stopping=yes
  [[ -n ${srun:-} ]] || return 0
  say "asks the ranks to save and end"
  kill -USR1 "$srun" 2>/dev/null || true # it has ended by itself
}

# on_ranks COMMAND: leaves srun's exit code in $status.
on_ranks() {
  status=0
  if [[ -n ${stopping:-} ]]; then
    say "is asked to end before its ranks have started"
    return
  fi
  trap 'say "is being ended"' TERM # by scancel, requeue, preemption or the limit; Slurm tells the ranks itself
  # In the background, because bash runs a trap only while it waits; not in a function, since $! must be srun itself.
  "${step[@]}" --open-mode=append --output="$job/logs/%N.log" "$@" &
  srun=$!
  [[ -z ${stopping:-} ]] || { sleep 1 && stop_requested; } # it came this very moment: srun must be itself first, to take it
  wait "$srun" || status=$?
  while kill -0 "$srun" 2>/dev/null; do # a trap ended the wait, not the step
    status=0
    wait "$srun" || status=$?
  done
  srun=
  ((status == 0)) || tail -n 5 "$job"/logs/*.log || true # there are none where the step could not start
}

# conclude [--out FOLDER]: done, failed for good, or once more?  A job that Slurm is ending or requeueing is not ours to requeue.
conclude() {
  local code_of_job=0 verdict
  verdict=$(cd "$code" && python -m launcher job after "$job" "$status" "$@") || code_of_job=$?
  say "$verdict"
  if ((code_of_job == 75)) && [[ $(scontrol -o show job "$SLURM_JOB_ID") == *" JobState=RUNNING "* ]]; then
    trap '' TERM # the requeue's, which comes to this shell and its commands too
    scontrol requeue "$SLURM_JOB_ID"
    exclude
  fi
  exit "$code_of_job"
}

# The requeued job leaves out the nodes that training found slow (run.on_straggler), besides those it left out before.
# Slurm takes that of a pending job only.
exclude() {
  local hosts before
  [[ -f $job/exclude.txt ]] || return 0
  hosts=$(paste -sd, "$job/exclude.txt")
  for _ in {1..20}; do
    before=$(scontrol -o show job "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
    [[ $before != "(null)" ]] || before=
    if scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=${before:+$before,}$hosts"; then
      say "goes on without $hosts"
      return
    fi
    sleep 0.5
  done
  say "cannot exclude $hosts: it may come back to them"
}

# The value of an option among words: --name value, --name=value.
option() {
  local name=$1
  shift
  while (($# > 0)); do
    case $1 in
      "$name") echo "${2:-}" ;;
      "$name"=*) echo "${1#*=}" ;;
    esac
    shift
  done
}

say() {
  echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $*"
}
