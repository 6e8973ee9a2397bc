#!/bin/sh
# Check and time cora on this machine's GPU: sh scripts/gpu_check.sh [RESULT.json [--benchmark]]. Needs the embedded model.
#
# The JSON holds what `cora doctor --gpu-check` found, tokens per second of cora and of PEFT with the stock Trainer among it, and the seconds of
# each check. On an H200, ten of the eleven checks took five minutes together (docs/results/h200.md); options, in which --compile compiles, did not
# end within 100 s. --benchmark also runs benchmarks/training.py, whose rounds compare with more programs and are
# added to benchmarks/results.json. PYTHON names another interpreter than that of .venv.
set -eu
result=${1:-gpu-check.json}
case ${2:-} in
"" | --benchmark) ;;
*)
	echo "gpu_check.sh: the second argument can only be --benchmark, not $2" >&2
	exit 2
	;;
esac
case $result in
--*)
	echo "gpu_check.sh: name the JSON file before $result" >&2
	exit 2
	;;
/*) ;;
*) result=$PWD/$result ;;
esac
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
failed=0
"$python" -m cora_cli doctor --gpu-check --output "$result" || failed=$?
if [ -n "${2:-}" ]; then
	"$python" benchmarks/training.py --rounds 3 --steps 24
fi
exit $failed
