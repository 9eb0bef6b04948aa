#!/usr/bin/env bash
# What a GPU has to show, in at most 8 minutes and without a network: see docs/developing/gpu.md.
#
#     tests/gpu/run.sh [--device cuda|cpu] [-o FILE.json] [--quick] [--smollm2 FOLDER]
#
# PYTHON names another interpreter than the project's. What was seen before it is stopped is kept.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$here/../.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$(command -v "$python")" ] || python=python3
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$root:$root/tests:$root/tests/benchmarks:$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$here/gpu_run.py" "$@"
