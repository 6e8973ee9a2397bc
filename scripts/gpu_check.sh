#!/bin/sh
# Check and time cora on this machine's GPU: sh scripts/gpu_check.sh [RESULT.json]. Takes about ten minutes and needs the embedded model.
#
# The JSON holds what `cora doctor --gpu-check` found. The benchmark prints tokens per second of cora and of PEFT with the stock Trainer,
# and adds them to benchmarks/results.json. PYTHON names another interpreter than that of .venv.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
result=${1:-gpu-check.json}
failed=0
"$python" -m cora_cli doctor --gpu-check --output "$result" || failed=$?
"$python" benchmarks/training.py --rounds 3 --steps 24
exit $failed
