#!/usr/bin/env bash
# Stops the cluster that up.sh started in DIR, and only that one.
#   scripts/slurm/virtual/down.sh [DIR]
set -u
dir=${1:-${VIRTUAL_SLURM_DIR:-/tmp/slurm-virtual}}
if [ ! -e "$dir/env.sh" ]; then
  echo "no cluster in $dir"
  exit 0
fi
# shellcheck disable=SC1091  # written by up.sh
. "$dir/env.sh"
dir=$VIRTUAL_SLURM_DIR
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if timeout 5 scancel --quiet --user="$(id -un)" 2>/dev/null; then
  for ((tenths = 0; tenths < 20; tenths++)); do
    [ -z "$(timeout 5 squeue -h -t R,CG 2>/dev/null)" ] && break
    sleep 0.1
  done
fi
read -r -d '' -a pids < <("$here/node.sh" pids "$VIRTUAL_SLURM_NODES" "$dir")
for file in "$dir"/run/slurmctld.pid "$dir"/run/munged.pid; do
  pid=$(cat "$file" 2>/dev/null) && grep -aqF -- "$dir/" "/proc/$pid/cmdline" 2>/dev/null && pids+=("$pid")
done
living() { for pid in "${pids[@]}"; do if [ -d "/proc/$pid" ]; then echo "$pid"; fi; done; }
[ ${#pids[@]} -gt 0 ] && kill "${pids[@]}" 2>/dev/null
for ((tenths = 0; tenths < 30; tenths++)); do
  [ -z "$(living)" ] && break
  sleep 0.1
done
# shellcheck disable=SC2046  # one word a process
[ -n "$(living)" ] && kill -9 $(living) 2>/dev/null
rm -f "$dir/env.sh"
if [ -w /etc/hosts ] && grep -q "# slurm-virtual $dir\$" /etc/hosts; then
  # Written in place: in a container /etc/hosts is a mount point.
  grep -v "# slurm-virtual $dir\$" /etc/hosts >"$dir/hosts" && cat "$dir/hosts" >/etc/hosts
fi
echo "slurm down: $dir"
