#!/bin/bash
# A run on a Cloud TPU slice of several hosts, one process per host, over gcloud:
#
#   export TPU_NAME=my-slice ZONE=us-west4-a
#   launch/tpu-vm.sh setup                                   # once: copies the repository, installs
#   launch/tpu-vm.sh train configs/quickstart.yaml output=/mnt/runs/first [section.key=value ...]
#   launch/tpu-vm.sh stop                                    # saves a checkpoint and ends the run
#
# Run it from the repository. `output` must lie on a file system that all hosts share, such as
# Filestore mounted at the same place. `train` may be repeated: it goes on from the last checkpoint,
# also on a slice of another size.
#
# CHANGE through the environment: TPU_NAME and ZONE, and where the repository lies on the hosts.
set -eu
: "${TPU_NAME:?set it to the name of the TPU}" "${ZONE:?set it to its zone}"
DIRECTORY=${DIRECTORY:-jaxmoo}
PYTHON=${PYTHON:-.venv/bin/python}

everywhere() {
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="$1"
}

action=${1:-}
shift || true
case $action in
  setup)
    everywhere "rm -rf $DIRECTORY"
    gcloud compute tpus tpu-vm scp --recurse . "$TPU_NAME:$DIRECTORY" --zone="$ZONE" --worker=all
    everywhere "cd $DIRECTORY && python3 -m venv .venv && .venv/bin/pip install '.[train]' 'jax[tpu]'"
    ;;
  train)
    # --distributed: on a TPU VM only the metadata server knows the other hosts; JAX asks it.
    # exec and the file of its number: so that `stop` reaches this run and no other.
    everywhere "cd $DIRECTORY && echo \$\$ > .run.pid && exec $PYTHON -m jaxmoo train --distributed --config $(printf '%q ' "$@")"
    ;;
  stop)
    everywhere "kill -TERM \$(cat $DIRECTORY/.run.pid)"
    ;;
  *)
    echo "usage: $0 setup | train CONFIG [section.key=value ...] | stop" >&2
    exit 2
    ;;
esac
