# Sourced by the demos: from the top of the checkout, `ranks ARGUMENTS` runs run.py on two ranks of this machine.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Ranks find each other through a file: no port to collide with another run on this machine.
export DIFFMOE_STORE="$scratch/ranks"
# Two ranks need two GPUs; with fewer the CPU does it.
[ "$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" -ge 2 ] || export DS_ACCELERATOR=cpu

ranks() { rm -f "$DIFFMOE_STORE"; deepspeed --log_level error --num_gpus 2 run.py "$@"; }
