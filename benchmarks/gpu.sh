#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under seven minutes, and one table at its end:
# plain fine-tuning, conflicts resolved in the backward pass, stacked gradients, TorchJD, the
# largest model that fits, packed rows, adapters, and the kernels; all with random weights of true
# shape.
#
#   benchmarks/gpu.sh [--only SECTION]... [DIRECTORY FOR THE NUMBERS]
#   benchmarks/gpu.sh --smoke [DIRECTORY]     tiny shapes on the CPU, to see that everything runs
#
# Sections: kernels, 1.7b, 0.6b, packed, largest, lora, long, pytorch; with --only, just those, and
# what the directory already holds of others stays in the table.
# Every section has a time limit of its own, and what was measured before it struck is in the table.
# Nothing is downloaded; what must be installed is in benchmarks/README.md.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

smoke='' only=''
while [[ ${1:-} == --* ]]; do
  case $1 in
    --smoke) smoke=1 ;;
    --only)
      only+=" ${2:-} "
      shift
      ;;
    *)
      echo "unknown flag $1" >&2
      exit 2
      ;;
  esac
  shift
done
sections=(kernels 1.7b 0.6b packed largest lora long pytorch)
for name in $only; do
  if [[ " ${sections[*]} " != *" $name "* ]]; then
    echo "unknown section $name: expected one of ${sections[*]}" >&2
    exit 2
  fi
done
out=${1:-gpu-results}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit
[[ $only ]] || rm -f "$out"/*.json
python=${PYTHON:-python3}
deadline=400 # seconds from the start
[[ $smoke ]] && deadline=3600
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# Memory is measured, so it is taken as it is needed, and all of it may be; by default JAX leaves a
# quarter of the device. A second call should not compile.
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=.95 TF_CPP_MIN_LOG_LEVEL=2
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/compiled}

# section NAME LIMIT COMMAND...: run a command, no longer than its limit and the deadline allow.
section() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) begun=$SECONDS code
  [[ $smoke ]] && limit=$deadline
  shift 2
  ((limit < left)) || limit=$left
  if ((limit < 5)); then
    echo "== $name: no time left"
    return 1
  fi
  echo "== $name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$python" "$@" 2> >(grep -v '^WARNING' | cut -c 1-1000 >&2)
  code=$?
  echo "== $name: exit code $code after $((SECONDS - begun)) s"
  return "$code"
}

if [[ $smoke ]]; then
  tiny=$out/tiny
  mkdir -p "$tiny"
  cat > "$tiny/config.json" << 'END'
{"model_type": "qwen3", "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48,
 "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
 "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": true}
END
  planned=$tiny
  platform=(--platform cpu) precision=(--dtype float32)
  languages=2 rounds=1 large_tokens=16
  export JAX_DISABLE_MOST_OPTIMIZATIONS=1
else
  planned=Llama-3.1-8B
  platform=(--platform gpu) precision=(--dtype bfloat16)
  languages=8 rounds=5 large_tokens=1024
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
fi
common=("${precision[@]}" --languages "$languages")
one=(--aggregators cagrad --blocks layer)
# All of the largest model's state in bfloat16 but the average of squared gradients.
large=(--param-dtype bfloat16 --moment-dtype bfloat16 --remat full
  --batch-size 1 --sequence-length "$large_tokens")

wanted() { [[ ! $only || $only == *" $1 "* ]]; }

# What the largest model would need, compiled on the host meanwhile.
planner=
if wanted largest; then
  planning=("${one[@]}")
  [[ $smoke ]] && planning=(--aggregators mean --blocks --no-stacked)
  env JAX_PLATFORMS=cpu nice "$python" benchmarks/scaling.py --model "$planned" "${common[@]}" \
    "${large[@]}" "${planning[@]}" --json "$out/plan.json" > "$out/plan.log" 2>&1 &
  planner=$!
fi

step() { # SECTION, MODEL, TOKENS PER EXAMPLE, EXAMPLES, FLAGS...
  local name=$1
  section "$name" 100 benchmarks/step.py "${platform[@]}" "${common[@]}" --model "$2" \
    --remat dots --sequence-length "$3" --batch-size "$4" --rounds "$rounds" "${@:5}" \
    --json "$out/step-$name.json"
}

if [[ $smoke ]]; then
  step tiny "$tiny" 16 2 --aggregators mean --blocks layer --no-stacked
  section kernels 60 benchmarks/kernels.py "${platform[@]}" --languages 2 --num-blocks 1 --smoke \
    --methods mgda --rounds 1 --json "$out/kernels.json"
else
  wanted kernels && section kernels 60 benchmarks/kernels.py "${platform[@]}" --languages 8 16 \
    --rounds 10 --json "$out/kernels.json"
  wanted 1.7b && step 1.7b Qwen3-1.7B 1024 4 --no-stacked --blocks layer \
    --aggregators mean mgda cagrad pcgrad upgrad
  wanted 0.6b && step 0.6b Qwen3-0.6B 1024 4 --aggregators cagrad --blocks layer module leaf
  wanted packed && step packed Qwen3-0.6B 1024 4 "${one[@]}" --no-stacked --packing
  wanted largest && for model in Llama-3.1-8B Qwen3-4B; do
    section "largest: $model" 100 benchmarks/step.py "${platform[@]}" "${common[@]}" "${one[@]}" \
      "${large[@]}" --model "$model" --no-stacked --rounds 2 --json "$out/largest.json" && break
  done
  wanted lora && step lora Qwen3-1.7B 1024 4 "${one[@]}" --no-stacked --lora 16
  wanted long && step long Qwen3-1.7B 4096 1 "${one[@]}" --no-stacked
  # A part of the model: every contestant is a process that draws its weights on the host first.
  wanted pytorch && section pytorch 100 benchmarks/peers.py "${platform[@]}" "${common[@]}" --rounds 2 \
    --layers 4 --model Qwen3-0.6B --remat full --batch-size 1 --sequence-length 1024 \
    --only "TorchJD by rows" TorchJD "PyTorch plain" --json "$out/peers.json"
fi
if [[ $planner ]]; then
  while kill -0 "$planner" 2> /dev/null && ((SECONDS < deadline)); do sleep 1; done
  kill "$planner" 2> /dev/null
fi
"$python" benchmarks/gpu_table.py "$out"
