#!/usr/bin/env bash
# Waits until a job has ended for good and prints how: exit 0 when COMPLETED, 1 when it ended otherwise, 2 when time ran out.
#   scripts/slurm/virtual/wait.sh JOB [SECONDS]
# (sbatch --wait looks after 2, 10, 42, 74 ... seconds.)
job=$1 end=$((SECONDS + ${2:-60})) seen=0
while [ $SECONDS -lt $end ] && [ $seen -lt 2 ]; do
  state=$(scontrol -o show job "$job" 2>/dev/null | grep -o -m1 'JobState=[A-Z_]*')
  state=${state#JobState=}
  case $state in
    COMPLETED | FAILED | TIMEOUT | CANCELLED | NODE_FAIL | OUT_OF_MEMORY | BOOT_FAIL | DEADLINE) seen=$((seen + 1)) ;;
    *) seen=0 ;; # PREEMPTED, COMPLETING ... may still become PENDING
  esac
  sleep 0.1
done
scontrol -o show job "$job" | grep -o -E '(JobId|JobState|Reason|Restarts|ExitCode|RunTime| NodeList)=[^ ]*' | xargs
[ $seen -ge 2 ] || exit 2
[ "$state" = COMPLETED ]
