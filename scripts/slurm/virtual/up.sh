#!/usr/bin/env bash
# Starts a real Slurm on this one machine: munged, slurmctld, and one slurmd for each virtual node.  For tests and for trying
# job scripts; Debian 12's packages are what it was tried with (slurmctld slurmd slurm-client munge, Slurm 22.05).
#   scripts/slurm/virtual/up.sh [DIR]          then: source DIR/env.sh, and sbatch, srun, squeue ... work
# From the environment:
#   NODES=4 CPUS=128 MEM=2000000 GPUS=8 GPU_TYPE=h200 FEATURES=virtual PARTITIONS="batch gpu"
#                 what each node claims to have, so that a job script for a real cluster is accepted
#   NAMES=hosts   PREFIX=node: node1 ... nodeN, written into /etc/hosts (what root gets by default)
#   NAMES=ip      nodes are called 127.0.77.1 ... N: they resolve without /etc/hosts (the default of others)
#   SLURMD_TIMEOUT=10 KILL_WAIT=5 CRED_EXPIRE=10     seconds, see slurm.conf(5)
# Everything lies below DIR (default /tmp/slurm-virtual, at most 60 characters); several clusters live side by side.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dir=${1:-/tmp/slurm-virtual}
NODES=${NODES:-4} PREFIX=${PREFIX:-node} CPUS=${CPUS:-128} MEM=${MEM:-2000000} GPUS=${GPUS:-8}
GPU_TYPE=${GPU_TYPE:-h200} FEATURES=${FEATURES:-virtual} PARTITIONS=${PARTITIONS:-batch gpu}
SLURMD_TIMEOUT=${SLURMD_TIMEOUT:-10} KILL_WAIT=${KILL_WAIT:-5} CRED_EXPIRE=${CRED_EXPIRE:-10}
if [ "$(id -u)" = 0 ]; then NAMES=${NAMES:-hosts}; else NAMES=${NAMES:-ip}; fi
export PATH=$PATH:/usr/sbin:/sbin

for tool in munged slurmctld slurmd sbatch; do
  if ! command -v "$tool" >/dev/null; then
    echo "$tool is missing: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge" >&2
    exit 1
  fi
done
if [ -e "$dir" ] && [ ! -e "$dir/.slurm-virtual" ]; then
  echo "$dir exists and is no virtual cluster's" >&2
  exit 1
fi
if [ -e "$dir/env.sh" ]; then "$here/down.sh" "$dir"; fi
rm -rf "$dir"
mkdir -p "$dir"/{munge,state,run,log,spool,dev,stepd}
dir=$(cd "$dir" && pwd)
if [ ${#dir} -gt 60 ]; then
  echo "$dir is too long a path for the Unix sockets below it (60 characters at most)" >&2
  exit 1
fi
touch "$dir/.slurm-virtual"
chmod 755 "$dir" "$dir/munge"

# --- a free port for slurmctld and one for each slurmd
read -r -a ports < <(python3 - "$NODES" <<'PY'
import random, socket, sys
wanted, found = int(sys.argv[1]) + 1, []
for port in random.sample(range(20000, 32000), 2000):
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            continue
    found.append(port)
    if len(found) == wanted:
        break
print(*found)
PY
)

# --- names and addresses
# With root and `unshare --uts` every virtual node has a host name and a loopback address of its own, as on a real cluster.
# Without, all share the address of this machine's host name: torchrun's c10d rendezvous finds its host by comparing those.
uts=no
if [ "$NAMES" = hosts ] && unshare --uts hostname slurm-virtual 2>/dev/null; then uts=yes; fi
host_address=$(python3 -c '
import socket
try:
    address = socket.gethostbyname(socket.gethostname())
    socket.socket().bind((address, 0))
except OSError:
    address = "127.0.0.1"
print(address)')
node_lines="" names=()
for ((i = 1; i <= NODES; i++)); do
  name=$PREFIX$i address=127.0.77.$i
  if [ "$NAMES" = ip ]; then name=$address; elif [ "$uts" = no ]; then address=$host_address; fi
  names+=("$name")
  node_lines+="NodeName=$name NodeAddr=$address Port=${ports[$i]}"$'\n'
  if [ "$NAMES" = hosts ]; then
    known=$(getent ahostsv4 "$name" | awk 'NR == 1 { print $1 }' || true)
    if [ -n "$known" ] && [ "$known" != "$address" ]; then
      echo "$name is $known already, not $address: choose another PREFIX" >&2
      exit 1
    fi
    echo "$address $name # slurm-virtual $dir" >>/etc/hosts # another cluster's line may go before ours does
  fi
done

# --- GPUs: links to a character device satisfy Slurm, which then sets CUDA_VISIBLE_DEVICES as on a real node
echo "AutoDetect=off" >"$dir/gres.conf"
for ((gpu = 0; gpu < GPUS; gpu++)); do ln -s /dev/null "$dir/dev/gpu$gpu"; done
if [ "$GPUS" -gt 0 ]; then
  if [ "$GPUS" = 1 ]; then range=0; else range="[0-$((GPUS - 1))]"; fi
  echo "Name=gpu Type=$GPU_TYPE File=$dir/dev/gpu$range" >>"$dir/gres.conf"
fi
echo "# none" >"$dir/plugstack.conf"

partition_lines="" default=YES
for partition in $PARTITIONS; do
  partition_lines+="PartitionName=$partition Default=$default"$'\n'
  default=NO
done
conf=$(<"$here/slurm.conf.in")
fill() { conf=${conf//@$1@/$2}; }
fill DIR "$dir"; fill USER "$(id -un)"; fill CONTROLLER_PORT "${ports[0]}"; fill CPUS "$CPUS"; fill MEM "$MEM"
fill GPUS "$GPUS"; fill GPU_TYPE "$GPU_TYPE"; fill FEATURES "$FEATURES"; fill SLURMD_TIMEOUT "$SLURMD_TIMEOUT"
fill KILL_WAIT "$KILL_WAIT"; fill CRED_EXPIRE "$CRED_EXPIRE"; fill PARTITIONS "$partition_lines"; fill NODES "$node_lines"
printf '%s\n' "$conf" >"$dir/slurm.conf"
cat >"$dir/env.sh" <<ENV
export SLURM_CONF=$dir/slurm.conf
export VIRTUAL_SLURM_DIR=$dir
export VIRTUAL_SLURM_NODES="${names[*]}"
export VIRTUAL_SLURM_UTS=$uts
ENV
export SLURM_CONF=$dir/slurm.conf

# --- daemons; -D keeps each in the foreground of a session of its own
mungekey --create --keyfile="$dir/munge/munge.key"
munged --force --key-file="$dir/munge/munge.key" --socket="$dir/munge/munge.socket" \
  --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/munge/munged.seed" --num-threads=4
setsid slurmctld -D -c -f "$SLURM_CONF" </dev/null >"$dir/log/slurmctld.out" 2>&1 &
"$here/node.sh" start "${names[*]}" "$dir"

for ((tenths = 0; tenths < 300; tenths++)); do
  idle=$(sinfo -h -N -o '%N %T' 2>/dev/null | sort -u | grep -c ' idle$' || true)
  if [ "$idle" = "$NODES" ]; then
    echo "slurm up: $NODES nodes (${names[*]}); source $dir/env.sh"
    exit 0
  fi
  sleep 0.1
done
echo "slurm did not come up; its logs are in $dir/log" >&2
sinfo -N -l >&2 || true
tail -n 20 "$dir"/log/*.out >&2
"$here/down.sh" "$dir"
exit 1
