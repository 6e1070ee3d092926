#!/usr/bin/env bash
# Everything that waits for a GPU, on a machine that has PyTorch and Triton but no network: build, smoke,
# benchmarks, tests, tuning. Two commands of less than ten minutes each:
#
#   benchmarks/gpu_session.sh OUTPUT_FOLDER first     # build, smoke, the benchmarks that matter most, chosen tests
#   benchmarks/gpu_session.sh OUTPUT_FOLDER second    # all tests, the rest of the benchmarks, tuning, profiles
#   benchmarks/gpu_session.sh OUTPUT_FOLDER plan      # what is expected to take how long; runs nothing
#
# or the names of steps instead of `first`. PYTHON is the interpreter that has PyTorch (python3). Nothing is installed:
# the compiled module goes into src/. Steps are bounded in time and independent, and what is known is on disk at once:
# summary.txt, results.json, logs.tar.gz and the tuned tiles in OUTPUT_FOLDER. Without a CUDA device it is a rehearsal:
# Triton's interpreter stands in for it, and benchmarks say that they are skipped.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
exec env PYTHONUNBUFFERED=1 "${PYTHON:-python3}" "$here/gpu_session.py" "$@"
