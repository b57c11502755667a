#!/bin/bash
# A run on several nodes of a Slurm cluster, one process per GPU:
#
#   sbatch launch/slurm.sh configs/quickstart.yaml output=/shared/runs/first [section.key=value ...]
#
# Run it from the repository. `output` must lie on a file system that all nodes share. The job saves
# a checkpoint when its time is nearly over or it is preempted, and puts itself back into the queue.
#
# CHANGE the lines below to your cluster; `sbatch --nodes=4 launch/slurm.sh ...` also changes them.
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

# CHANGE to where `pip install ".[train]" "jax[cuda12]"` was done.
PYTHON=${PYTHON:-.venv/bin/python}

# Bash stays to requeue the job; the processes get the signal from Slurm.
trap : TERM

# --kill-on-bad-exit: when one process dies, Slurm ends the others without waiting for JAX to notice.
srun --kill-on-bad-exit=1 "$PYTHON" -m jaxmoo train --config "$@"
code=$?

# 143: stopped by SIGTERM, everything saved; the same command goes on from there. Any other code
# is for a person to look at: 1 failed along the way, 2 bad settings or data.
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
