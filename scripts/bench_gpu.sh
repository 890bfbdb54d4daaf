#!/usr/bin/env bash
# Everything that a GPU should be asked, kept in one folder: one call does it all (about 25 minutes), parts may be named.
#   scripts/bench_gpu.sh docs/results/speed_h200_2026-12-01 [parity | layer | step | sampling | train]...
# parity    training on the GPU is the plain process's
# layer     the mixture layer beside the dense MLP, the textbook loop and DeepSpeed's layer; where its time goes
# step      the published batch of 256, eager, compiled and recomputed: share of the matmul ceiling, images/s, memory, kernels
# sampling  capacity 0.7 beside 1.0
# train     bf16 training of every size: time, memory and traffic beside the plan; `launcher plan --calibrate` reads the records
# BENCH_SAMPLES: samples of a micro-batch (64; "fit": as many as memory allows).  On a CPU BENCH_TINY=1 is a dry run of the same lines.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: scripts/bench_gpu.sh FOLDER [PART...]}
shift
[ $# -gt 0 ] || set -- parity layer step sampling train
mkdir -p "$out"
python=${PYTHON:-python}
if [ -n "${BENCH_TINY:-}" ]; then
    device=cpu; dtype=fp32; zero=zero0_fp32; tokens=256; samples=1; accumulation=2; repeats=1
    wide=(--set model.width=32 model.heads=2); deep=("${wide[@]}" model.depth=2); small=(model.width=32 model.heads=2 model.depth=2 train.batch=2)
else
    device=cuda; dtype=bf16; zero=zero1_bf16; tokens=65536; samples=${BENCH_SAMPLES:-64}; repeats=11; wide=(); deep=(); small=()
    accumulation=1; [ "$samples" = fit ] || accumulation=$((256 / samples))
fi

bench() { $python run.py bench "$@" --dtype $dtype --repeats $repeats --out "$out"; }
sizes() { for size in "l 16" "xl 8"; do read -r model experts <<< "$size"; "$@" --model "$model" --experts "$experts"; done; }

for part in "$@"; do
    case $part in
    parity) $python run.py verify --quick --worlds "${BENCH_WORLDS:-1}" --device $device --json "$out/parity.json" | tee "$out/parity.txt" ;;
    layer) layer() { bench moe-layer --profile --tokens $tokens "$@" "${wide[@]}"; }; sizes layer ;;
    step)
        step() { bench step --samples "$samples" --accumulation $accumulation "$@" "${deep[@]}"; }
        sizes step --compile --profile
        step --recompute --model l --experts 16 ;;
    sampling) sampling() { bench sampling --samples ${samples/fit/64} "$@" "${deep[@]}"; }; sizes sampling ;;
    train)
        for model in s_e16 b_e16 l_e16 xl_e8; do
            $python run.py profile --config configs/diffmoe_${model}_flow.yaml --deepspeed_config ds_configs/$zero.json --synthetic \
                --warmup 2 --steps 5 --json "$out/train.jsonl" parallel.ep=1 train.micro_batch=${samples/fit/64} \
                parallel.recompute=selective moe.pool=rank "${small[@]}" | tee "$out/train_$model.txt"
        done ;;
    *) echo "error: part ($part) must be parity, layer, step, sampling or train" >&2; exit 2 ;;
    esac
done
