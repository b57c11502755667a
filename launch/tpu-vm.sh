#!/bin/bash
# A run on a Cloud TPU slice of one or more hosts, one process per host, over gcloud:
#
#   export TPU_NAME=my-slice ZONE=us-west4-a TYPE=v5litepod-16
#   launch/tpu-vm.sh run quickstart output=gs://my-bucket/runs/first [section.key=value ...]
#
# `run` asks for the slice as a queued resource, waits until it is there, installs the wheel, trains
# until the run is complete, and asks for another slice when this one is taken away; the run goes on
# from its last checkpoint in the bucket, also on a slice of another size. Keep it going in tmux.
# Its parts: create, setup, train, stop (saves a checkpoint and ends the run), delete.
#
# CHANGE through the environment: TPU_NAME, ZONE and TYPE; SPOT=1 for spot capacity; RUNTIME, the
# software of the hosts; JAXMOO, what pip installs, or the address of a wheel in a bucket (gs://...).
# The config is the name of an example, or a YAML file here.
set -eu
: "${TPU_NAME:?set it to the name of the TPU}" "${ZONE:?set it to its zone}"
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
JAXMOO=${JAXMOO:-jaxmoo}
DIRECTORY=${DIRECTORY:-jaxmoo}
PYTHON=${PYTHON:-.venv/bin/python}
WAIT=${WAIT:-30}  # seconds between two looks

# What follows is made of variables here, and of those with a backslash there.
on() {
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

# ACTIVE, or why not; empty if it is not asked for.
state() {
  gcloud compute tpus queued-resources describe "$TPU_NAME" --zone="$ZONE" \
    --format='value(state.state)' 2> /dev/null || true
}

create() {
  gcloud compute tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" --zone="$ZONE" \
    --accelerator-type="${TYPE:?set it to the type of the slice}" --runtime-version="$RUNTIME" \
    ${SPOT:+--spot}
}

delete() {
  gcloud compute tpus queued-resources delete "$TPU_NAME" --zone="$ZONE" --force --quiet
}

setup() {
  local fetch=: what="'${JAXMOO}[buckets,train]'"
  case $JAXMOO in
    gs://*)
      fetch="gcloud storage cp '$JAXMOO' ."
      what="\"\$PWD/$(basename "$JAXMOO")[buckets,train]\""
      ;;
  esac
  on all "mkdir -p $DIRECTORY && cd $DIRECTORY && $fetch && python3 -m venv .venv && .venv/bin/pip install -q $what 'jax[tpu]'"
}

# --distributed: on a TPU VM only the metadata server knows the other hosts; JAX asks it.
# What is still at work there, after a lost connection, is ended first.
# The files: so that `stop` reaches this run and no other, and `run` learns how it ended.
train() {
  local config=$1 write=:
  shift
  if [ -f "$config" ]; then
    write="echo $(base64 < "$config" | tr -d '\n') | base64 -d > config.yaml"
    config=config.yaml
  fi
  on all "cd $DIRECTORY && $write && while kill -TERM \$(cat .run.pid) 2> /dev/null; do sleep 1; done; rm -f .run.code; { $PYTHON -m jaxmoo train --distributed --config $(printf '%q ' "$config" "$@")& } && echo \$! > .run.pid && { wait \$!; echo \$? > .run.code; exit \$(cat .run.code); }"
}

run() {
  local code
  while true; do
    case $(state) in
      ACTIVE)
        { setup && train "$@"; } || true
        # How it ended on the first host; nothing, where the slice is gone.
        code=$(on 0 "cat $DIRECTORY/.run.code" 2> /dev/null || true)
        # Complete; or failed along the way, or bad settings: for a person to look at.
        case $code in 0 | 1 | 2) return "$code" ;; esac
        ;;
      SUSPENDED | FAILED) delete ;;
      '') create ;;
    esac
    sleep "$WAIT"
  done
}

action=${1:-}
shift || true
case $action in
  create | setup | train | run | delete) "$action" "$@" ;;
  stop) on all "kill -TERM \$(cat $DIRECTORY/.run.pid)" ;;
  *)
    echo "usage: $0 run CONFIG [section.key=value ...] | create | setup | train ... | stop | delete" >&2
    exit 2
    ;;
esac
