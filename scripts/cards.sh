#!/usr/bin/env bash
# Score cards of the demo's model (after `make demo`), in the digits' own feature space: two capacities by two routing rules.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=runs/demo
for capacity in 0.7 1.0; do
    for routing in token batch; do
        out=$run/cards/capacity_${capacity}_$routing
        python run.py evaluate --checkpoint "$run" --reference data/digits --extractor digits --count 1000 --no-samples \
            --out "$out" sample.capacity=$capacity sample.routing=$routing
    done
    python run.py sample --checkpoint "$run" --count 200 --capacity $capacity --report --out "$run/cards/capacity_$capacity"
done
