#!/usr/bin/env bash
# Everything that a GPU should be asked, kept in one folder: one call does it all (about half an hour), parts may be named.
# What fails is said at the end, and by the exit status; the rest goes on.
#   scripts/bench_gpu.sh docs/results/speed_h200_2026-12-01 [parity | layer | step | sampling | train]...
# parity    training on the GPU is the plain process's, eager and compiled
# layer     the mixture layer beside the dense MLP, the textbook loop and DeepSpeed's layer; where its time goes
# step      the published batch of 256, eager, compiled and recomputed: share of the matmul ceiling, images/s, memory, kernels
# sampling  capacity 0.7 beside 1.0
# train     bf16 training of every size: time, memory and traffic beside the plan; `launcher plan --calibrate` reads the records
# BENCH_SAMPLES: samples of a micro-batch (64; "fit": as many as memory allows).  On a CPU BENCH_TINY=1 is a dry run of the same lines.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: scripts/bench_gpu.sh FOLDER [PART...]}
shift
[ $# -gt 0 ] || set -- parity layer step sampling train
for part in "$@"; do
    case $part in parity | layer | step | sampling | train) ;; *)
        echo "error: part ($part) must be parity, layer, step, sampling or train" >&2
        exit 2 ;;
    esac
done
mkdir -p "$out"
python=${PYTHON:-python}
if [ -n "${BENCH_TINY:-}" ]; then
    device=cpu; dtype=fp32; zero=zero0_fp32; tokens=256; samples=1; accumulation=2; repeats=1; quick=--quick
    wide=(--set model.width=32 model.heads=2); deep=("${wide[@]}" model.depth=2); small=(model.width=32 model.heads=2 model.depth=2 train.batch=2)
else
    device=cuda; dtype=bf16; zero=zero1_bf16; tokens=65536; samples=${BENCH_SAMPLES:-64}; repeats=11; quick=; wide=(); deep=(); small=()
    accumulation=1; [ "$samples" = fit ] || accumulation=$((256 / samples))
fi

failed=()
tried() { "$@" || failed+=("$*"); }
verify() { local name=$1; shift; $python run.py verify --worlds "${BENCH_WORLDS:-1}" --device $device --json "$out/$name.json" "$@" | tee "$out/$name.txt"; }
bench() { tried $python run.py bench "$@" --dtype $dtype --repeats $repeats --out "$out"; }
layer() { bench moe-layer --profile --tokens $tokens "$@" "${wide[@]}"; }
step() { bench step --samples "$samples" --accumulation $accumulation "$@" "${deep[@]}"; }
sampling() { bench sampling --profile --samples "${samples/fit/64}" "$@" "${deep[@]}"; }
sizes() { local size; for size in "l 16" "xl 8"; do read -r model experts <<< "$size"; "$@" --model "$model" --experts "$experts"; done; }
train() {
    $python run.py profile --config configs/diffmoe_"$1"_flow.yaml --deepspeed_config ds_configs/$zero.json --synthetic --warmup 2 \
        --steps 5 --json "$out/train.jsonl" parallel.ep=1 train.micro_batch="${samples/fit/64}" parallel.recompute=selective \
        moe.pool=rank "${small[@]}" | tee "$out/train_$1.txt"
}

for part in "$@"; do
    case $part in
    parity) tried verify parity $quick; tried verify parity_compiled --compile ;;
    layer) sizes layer ;;
    step) sizes step --compile --profile; step --recompute --model l --experts 16 ;;
    sampling) sizes sampling ;;
    train) for model in s_e16 b_e16 l_e16 xl_e8; do tried train $model; done ;;
    esac
done
[ ${#failed[@]} -eq 0 ] || { printf 'error: failed: %s\n' "${failed[@]}" >&2; exit 1; }
