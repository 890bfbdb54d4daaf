#!/usr/bin/env bash
# Everything that a GPU should be asked, the cheapest truth first, kept in one folder and one archive of a few MB; no network.
#   [WHEELS=folder] [BENCH_MINUTES=9] scripts/bench_gpu.sh FOLDER [PART...]
# A part that takes longer than its limit is ended and noted, and so is what fails; the next part goes on.  The same command
# again does what was not tried yet, then what failed; parts that are named are done anew.  FOLDER/summary.md
# says what came of it, FOLDER.tar.gz is to be taken home.
# probe     versions, ceilings of products, copies and attention, experts without rows, new groups
# parity    training on the GPU is the plain process's: a few cases, then all
# profile   steps of L, XL and S, eager and compiled: measured, then counted and priced, by kernel
# layer     the MoE layer beside the dense MLP, the textbook loop and DeepSpeed's layer; where its time goes
# step      the published batch of 256, eager, compiled, recomputed: share of the matmul ceiling, images/s, memory, kernels
# sampling  capacity 0.7 beside 1.0
# train     a thousand steps of S-E16 on made-up latents, stopped and resumed in the middle
# compiled  parity of compiled training, which compiles every case anew
# WHEELS: folder of wheels that the image lacks (docs/cluster.md); they go into a folder of their own.  PYTHON: interpreter.
# BENCH_MINUTES: for everything; what finds no time is left out, and noted.  BENCH_LIMIT: seconds of every part.
# BENCH_SAMPLES: of a micro-batch (64), a divisor of 256.  BENCH_TINY=1: a dry run of the same lines on a CPU.
set -uo pipefail
start=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: scripts/bench_gpu.sh FOLDER [PART...]}
case $out in /*) ;; *) out=$start/$out ;; esac
out=${out%/}
shift
declare -A limits=([probe]=180 [parity]=300 [profile]=600 [layer]=300 [step]=600 [sampling]=240 [train]=600 [compiled]=900)
order="probe parity profile layer step sampling train compiled"
for part in "$@"; do
    [ -n "${limits[$part]:-}" ] || { echo "error: part ($part) must be one of $order" >&2; exit 2; }
done
for name in BENCH_MINUTES BENCH_LIMIT; do
    case ${!name:-1} in *[!0-9]* | 0) echo "error: $name (${!name}) must be a whole number above 0" >&2; exit 2 ;; esac
done
named=$#
mkdir -p "$out/status" || exit 2
deadline=$((SECONDS + 60 * ${BENCH_MINUTES:-100000}))

python=${PYTHON:-}
case $python in /*) ;; */*) python=$start/$python ;; esac
for try in "$PWD/.venv/bin/python" python3 python; do
    [ -n "$python" ] || ! command -v "$try" > /dev/null || python=$try
done
[ -n "$python" ] || { echo "error: there is no .venv, python3 or python: name one in PYTHON" >&2; exit 2; }
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    (cd "$start" && "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --disable-pip-version-check --target "$site" "$WHEELS"/*.whl) \
        || { echo "error: WHEELS ($WHEELS) cannot be installed" >&2; exit 2; }
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONUNBUFFERED=1

if [ -n "${BENCH_TINY:-}" ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} DS_ACCELERATOR=cpu
    device=cpu; gpu=cpu; dtype=fp32; zero=zero0_fp32; tokens=256; samples=1; accumulation=2; repeats=1; steps=40
    sizes=("l 16"); zoo=(s_e16)
    wide=(--set model.width=32 model.heads=2); deep=("${wide[@]}" model.depth=2); probe=(--samples 1 --seconds 0.001)
    priced=(--samples 4 --accumulation 1 --eager --time); compile=()
    train=(--samples 64 "${deep[@]}" train.batch=32 train.micro_batch=8 moe.pool=rank train.lr=0.003)
else
    device=cuda; gpu=h100; dtype=bf16; zero=zero1_bf16; tokens=65536; samples=${BENCH_SAMPLES:-64}; repeats=11; steps=1000
    sizes=("l 16" "xl 8"); zoo=(l_e16 xl_e8 s_e16)
    wide=(); deep=(); probe=(); priced=(); compile=(--compile); train=()
    accumulation=$((256 / samples))
    case $(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null) in *H200*) gpu=h200 ;; *A100*) gpu=a100 ;; esac
fi

failed=0; number=0; running=
declare -A now=()  # what this call has tried
tried() {  # ITEM COMMAND...: what the part may still take; its log and how it ended are kept
    local item=$1 log=$out/$1.log end=$out/status/$1.json began=$SECONDS rc=null
    local left=$(((part_end < deadline ? part_end : deadline) - began))
    shift
    number=$((number + 1))
    [ -z "${now[$item]:-}" ] || return
    if [ "$named" = 0 ]; then
        if grep -qs '"rc": 0,' "$end"; then return; fi
        if [ "$turn" = new ] && grep -qs '"rc": [1-9]' "$end"; then return; fi
    fi
    now[$item]=1
    if [ "$left" -gt 0 ]; then
        echo "$part: $item"
        timeout -k 15 "$left" "$python" run.py "$@" > "$log" 2>&1 &
        running=$!
        wait "$running"
        rc=$?
        case $rc in 124 | 137) kill -KILL -- "-$running" 2> /dev/null ;; esac  # whoever is left of it
        running=
        tail -c 100000 "$log" > "$log.end" && mv "$log.end" "$log"
    fi
    case $rc in
    0) ;;
    null) failed=1; echo "error: $item: no time left" >&2 ;;
    *) failed=1; echo "error: $item: exit code $rc, see $log" >&2 ;;
    esac
    printf '{"number": %d, "part": "%s", "item": "%s", "rc": %s, "seconds": %d, "limit": %d}\n' \
        "$number" "$part" "$item" "$rc" $((SECONDS - began)) $((left > 0 ? left : 0)) > "$end.new" && mv "$end.new" "$end"
}
keep() {
    "$python" run.py bench results "$out" || failed=1
    tar -czf "$out.tar.gz" --exclude=train_run --exclude='*.new' -C "$(dirname "$out")" "$(basename "$out")" || failed=1
}
stopped() {
    trap '' TERM INT
    [ -z "$running" ] || { kill -TERM "$running"; wait "$running"; }
    keep
    exit 143
}
trap stopped TERM INT

verify() {
    local item=$1
    shift
    tried "$item" verify --worlds "${BENCH_WORLDS:-1}" --device $device --json "$out/$item.json" "$@"
}
bench() { local item=$1; shift; tried "$item" bench "$@" --out "$out"; }
each() { local size; for size in "${sizes[@]}"; do read -r model experts <<< "$size"; "$@"; done; }
sized() {
    local kind=$1
    shift
    bench "${kind//-/_}_$model" "$kind" --model "$model" --experts "$experts" --dtype $dtype --repeats $repeats "$@"
}
layer() { sized moe-layer --profile --tokens $tokens "${wide[@]}"; }
step() { sized step --profile "${compile[@]}" --samples "$samples" --accumulation $accumulation "${deep[@]}"; }
recomputed() {
    bench step_recompute step --recompute --model l --experts 16 --dtype $dtype --repeats $repeats --samples "$samples" \
        --accumulation $accumulation "${deep[@]}"
}
sampling() { sized sampling --profile --samples "$samples" "${deep[@]}"; }
priced() {
    bench "profile_$1" roofline --config "configs/diffmoe_$1_flow.yaml" --deepspeed_config ds_configs/$zero.json --gpu $gpu \
        --repeats $repeats "${priced[@]}" "${deep[@]}"
}

for turn in new again; do
    number=0
    for part in $order; do
        number=$((10 * (number / 10 + 1)))  # the same whatever is named
        [ "$named" = 0 ] || [[ " $* " = *" $part "* ]] || continue
        part_end=$((SECONDS + ${BENCH_LIMIT:-${limits[$part]}}))
        case $part in
        probe) for what in machine experts nccl; do bench "probe_$what" probe $what "${probe[@]}"; done ;;
        parity)
            verify parity_quick --quick
            [ -n "${BENCH_TINY:-}" ] || verify parity ;;
        profile) for size in "${zoo[@]}"; do priced "$size"; done ;;
        layer) each layer ;;
        step) each step; recomputed ;;
        sampling) each sampling ;;
        train) bench train train --deepspeed_config ds_configs/$zero.json --steps $steps "${train[@]}" ;;
        compiled) verify parity_compiled --compile ${BENCH_TINY:+--quick} ;;
        esac
    done
done
keep
exit $failed
