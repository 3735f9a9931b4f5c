#!/usr/bin/env bash
# The engine's goals, measured on this machine: the demo model and the 1B shape in two quantisations.
# Wants an idle machine and about half an hour. JSON goes to the folder that is named, or to ./bench.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-bench}
mkdir -p "$out"
run=(.venv/bin/localllm bench --compare --shared-prefix)
"${run[@]}" demo -r 9 -o "$out/demo.json"
"${run[@]}" demo --shape 1b --quant q4_k_m -r 5 -o "$out/1b-q4_k_m.json"
"${run[@]}" demo --shape 1b --quant q8_0 -r 5 -o "$out/1b-q8_0.json"
