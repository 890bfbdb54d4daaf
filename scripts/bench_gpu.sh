#!/usr/bin/env bash
# Everything that a GPU should be asked, in one call, kept in one folder; on a CPU with BENCH_TINY=1 a dry run of the same lines.
#   scripts/bench_gpu.sh docs/results/speed_h200_2026-12-01
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: scripts/bench_gpu.sh FOLDER}
mkdir -p "$out"
python=${PYTHON:-python}
if [ -n "${BENCH_TINY:-}" ]; then
    device=cpu; dtype=fp32; tokens=256; samples=1; repeats=1; wide="--set model.width=32 model.heads=2"; deep="$wide model.depth=2"
else
    device=cuda; dtype=bf16; tokens=65536; samples=${BENCH_SAMPLES:-64}; repeats=11; wide=; deep=
fi
worlds=${BENCH_WORLDS:-1}
# Right before fast.
$python run.py verify --quick --worlds "$worlds" --device $device --json "$out/parity.json" | tee "$out/parity.txt"
for size in "l 16" "xl 8"; do
    read -r model experts <<< "$size"
    $python run.py bench moe-layer --model "$model" --experts "$experts" --tokens $tokens --dtype $dtype --repeats $repeats --out "$out" $wide
    $python run.py bench step --compile --model "$model" --experts "$experts" --samples $samples --dtype $dtype --repeats $repeats --out "$out" $deep
    $python run.py bench sampling --model "$model" --experts "$experts" --samples $samples --dtype $dtype --repeats $repeats --out "$out" $deep
done
$python run.py bench step --model l --recompute --samples $samples --dtype $dtype --repeats $repeats --out "$out" $deep
