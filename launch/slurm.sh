#!/bin/bash
# A run on several nodes of a Slurm cluster, one process per GPU:
#
#   sbatch launch/slurm.sh quickstart output=/shared/runs/first [section.key=value ...]
#
# `output` is on a file system that all nodes share, or in a bucket. The job saves a checkpoint when
# its time is nearly over or it is preempted, and puts itself back into the queue, as it does when a
# process or node is lost.
#
# CHANGE the lines below to your cluster; `sbatch --nodes=4 launch/slurm.sh ...` also changes them.
# `--nodes=1,2,4` takes what is free of these when it starts again: name numbers of nodes that divide
# the batch.
#SBATCH --job-name=jaxmoo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8        # as many as GPUs: under Slurm JAX gives each process one GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300          # seconds before the end of that time: a few steps and a save
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# CHANGE if your site asks for them:
##SBATCH --partition=gpu
##SBATCH --account=me

set -u

# CHANGE to where `pip install "jaxmoo[buckets,train]" "jax[cuda13]"` was done, or name an image of
# launch/Dockerfile instead, for pyxis (REGISTRY#jaxmoo:cuda, or a .sqsh file) or apptainer:
#   CONTAINER=/shared/jaxmoo.sqsh sbatch ...      APPTAINER=/shared/jaxmoo.sif sbatch ...
# Both see MOUNT (a folder, such as /shared) as the host does.
PYTHON=${PYTHON:-python3}
MOUNT=${MOUNT:-$PWD}
container=() command=("$PYTHON" -m jaxmoo)
if [ -n "${CONTAINER:-}" ]; then
  container=(--container-image="$CONTAINER" --container-mounts="$MOUNT:$MOUNT"
    --container-workdir="$PWD")
  command=(jaxmoo)
elif [ -n "${APPTAINER:-}" ]; then
  command=(apptainer exec --nv --bind "$MOUNT" --pwd "$PWD" "$APPTAINER" jaxmoo)
fi

# Bash stays to requeue the job; the processes get the signal from Slurm.
trap : TERM

# --kill-on-bad-exit: when one process dies, Slurm ends the others without waiting for JAX to notice.
srun --kill-on-bad-exit=1 "${container[@]}" "${command[@]}" train --config "$@"
code=$?

# 143: stopped by SIGTERM, everything saved; the same command goes on from there. 134 and 137: a
# process was lost; the job starts again, but not for ever: what fails (1) ends the others so, too.
# Any other code is for a person to look at: 1 failed along the way, 2 bad settings or data.
losses=.jaxmoo-$SLURM_JOB_ID.losses
case $code in
  143)
    rm -f "$losses"
    scontrol requeue "$SLURM_JOB_ID"
    ;;
  134 | 137)
    echo >> "$losses"
    [ "$(wc -l < "$losses")" -gt "${MAX_LOSSES:-3}" ] || scontrol requeue "$SLURM_JOB_ID"
    ;;
esac
exit "$code"
