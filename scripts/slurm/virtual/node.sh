#!/usr/bin/env bash
# Virtual nodes of the cluster in DIR, one by one.
#   scripts/slurm/virtual/node.sh start|kill|pids "NODE ..." [DIR]
#     start  starts the nodes' slurmd
#     kill   kill -9 of slurmd, slurmstepd and every task of theirs: nodes that lose power
#     pids   what kill would kill
set -euo pipefail
verb=${1:-} nodes=${2:-} dir=${3:-${VIRTUAL_SLURM_DIR:-/tmp/slurm-virtual}}
# shellcheck disable=SC1091  # written by up.sh
. "$dir/env.sh"
dir=$VIRTUAL_SLURM_DIR
export PATH=$PATH:/usr/sbin:/sbin

pids() {
  # shellcheck disable=SC2086  # one word a node
  python3 - "$dir" $nodes <<'PY'
import os, sys

root, nodes = sys.argv[1], set(sys.argv[2:])


def words(path):
    with open(path, "rb") as stream:
        return stream.read().decode(errors="replace").split("\0")


parents, found = {}, set()
for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
    try:
        with open(f"/proc/{pid}/stat") as stream:
            parents[pid] = int(stream.read().rpartition(")")[2].split()[1])
        command = words(f"/proc/{pid}/cmdline")
        program, environment = os.readlink(f"/proc/{pid}/exe"), set(words(f"/proc/{pid}/environ"))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        continue
    for node in nodes:
        step_daemon = f"{root}/stepd/{node}/slurmstepd"
        is_task = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={root}/slurm.conf"} <= environment
        if program.startswith(step_daemon) or ("slurmd" in program and step_daemon in command) or is_task:
            found.add(pid)
children = found
while children:
    children = {pid for pid, parent in parents.items() if parent in children and pid not in found}
    found |= children
print(*sorted(found - {os.getpid(), os.getppid()}), sep="\n")
PY
}

case $verb in
  start)
    for node in $nodes; do
      # Each node runs its own copy of slurmstepd: /proc/PID/exe then tells the nodes apart.
      mkdir -p "$dir/spool/$node" "$dir/stepd/$node"
      [ -e "$dir/stepd/$node/slurmstepd" ] || cp -L "$(command -v slurmstepd)" "$dir/stepd/$node/slurmstepd"
      command=(slurmd -D -N "$node" -d "$dir/stepd/$node/slurmstepd" -f "$SLURM_CONF")
      # shellcheck disable=SC2016  # $0 and $@ are the inner shell's
      [ "$VIRTUAL_SLURM_UTS" = no ] || command=(unshare --uts sh -c 'hostname "$0" && exec "$@"' "$node" "${command[@]}")
      setsid "${command[@]}" </dev/null >>"$dir/log/slurmd.$node.out" 2>&1 &
    done
    ;;
  pids) pids ;;
  kill)
    read -r -d '' -a victims < <(pids) || true
    [ ${#victims[@]} -eq 0 ] || kill -9 "${victims[@]}" 2>/dev/null || true
    echo "killed on $nodes: ${victims[*]}"
    ;;
  *)
    echo 'node.sh start|kill|pids "NODE ..." [DIR]' >&2
    exit 2
    ;;
esac
