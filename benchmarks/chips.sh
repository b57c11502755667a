#!/usr/bin/env bash
# The table of docs/benchmarks/chips.md, measured anew or, without AGAIN=1, filled up: rows for GPUs
# in one environment, those for TPUs in another.
#
#   GPU_PYTHON=.venv-gpu/bin/python TPU_PYTHON=.venv-tpu/bin/python benchmarks/chips.sh
#
#   python3 -m venv .venv-gpu && .venv-gpu/bin/python -m pip install -e ".[train,plan-gpu]"
#   python3 -m venv .venv-tpu && .venv-tpu/bin/python -m pip install -e ".[train,plan-tpu]"
set -euo pipefail
cd "$(dirname "$0")/.."

: "${GPU_PYTHON:?an environment with jaxmoo[plan-gpu]}" "${TPU_PYTHON:?one with jaxmoo[plan-tpu]}"
rows="${JSON:-docs/benchmarks/chips.json}"

for chips in h v; do
  python="$GPU_PYTHON"
  [[ $chips == v ]] && python="$TPU_PYTHON"
  "$python" benchmarks/chips.py --only "$chips" --json "$rows" ${AGAIN:+--again}
done
