#!/usr/bin/env bash
# Score cards of the demo's model (after `make demo`), in the digits' own feature space: two capacities by two routing rules.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=runs/demo

# torchrun gives each rank one thread; two threads of one process would spin waiting for each other on so small a model.
ranks() { torchrun --standalone --nproc-per-node 2 run.py "$@"; }

for capacity in 0.7 1.0; do
    for routing in token batch; do
        ranks evaluate --checkpoint "$run" --reference data/digits --extractor digits --count 500 --no-samples \
            --out "$run/cards/${routing}_$capacity" "sample.capacity=$capacity" "sample.routing=$routing"
    done
    ranks sample --checkpoint "$run" --count 200 --capacity "$capacity" --report --out "$run/cards/report_$capacity"
done
