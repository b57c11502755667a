"""How far a run has come, as its checkpoints tell, and how it goes on from there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxmoo.config import Config, to_yaml
from jaxmoo.data import LanguageBatches
from jaxmoo.errors import CheckpointError, DamagedError
from jaxmoo.runs.checkpoint import Checkpoints, unchecked
from jaxmoo.runs.provenance import architecture, check_base, check_settings, versions
from jaxmoo.train.condition import check_finite, examine
from jaxmoo.train.job import Job
from jaxmoo.train.setup import Setup
from jaxmoo.train.step import TrainState

__all__ = ["about", "batch_digest", "check_data", "resume"]


def batch_digest(batches: LanguageBatches, step: int) -> str:
    """Return a fingerprint of the batch of a step; all processes call this."""
    digest = hashlib.sha256()
    for name, array in sorted(batches.whole(step).items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def about(config: Config, setup: Setup, step: int) -> dict[str, Any]:
    """Describe a run for its checkpoint of a step: settings, versions, devices, next batch."""
    return {
        "step": step,
        "digests": True,
        "config": to_yaml(config),
        "versions": versions(),
        "mesh": dict(setup.device_mesh.shape),
        "architecture": architecture(setup.model),
        "base": setup.base,
        # Batches are a function of the step; a stream is told where to find the next one.
        "stream": setup.batches.state(step),
        "next_batch": batch_digest(setup.batches, step),
    }


def check_data(described: Mapping[str, Any], setup: Setup) -> None:
    """Go to the run's place in its data; raise unless these are what it has been trained on.

    The settings may be the same and the files behind them not.

    Args:
      described: what :func:`about` returned for the checkpoint.
      setup: what is to go on from it.

    Raises:
      CheckpointError: the next batch is not the one it would have been.
    """
    step = described["step"]
    setup.batches.seek(described.get("stream", {}))
    if described["next_batch"] != batch_digest(setup.batches, step):
        raise CheckpointError(
            f"data: the examples are no longer those of the run's beginning; its batch of step "
            f"{step + 1} would be another. Restore the files behind data.source (and the tokenizer "
            "of model.source), or start a new run with output=..."
        )


def resume(job: Job, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    """Return the state to begin with and the steps it has behind it.

    The newest checkpoint is restored, if there is one. If it is damaged, which is found before it
    is used, the one before takes its place, and the damaged one is set aside.

    Args:
      job: the run.
      checkpoints: those of its directory.

    Raises:
      DamagedError: all of them are damaged; nothing is moved.
      CheckpointError: the checkpoint is of other settings, another model or other data.
    """
    state, step = job.setup.state, checkpoints.latest()
    if step is None:
        return state, 0
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    damaged: dict[int, DamagedError] = {}
    while step is not None:
        try:
            described = _described(job, checkpoints, step)
            # There is not always room for two.
            jax.tree.map(lambda x: x.is_deleted() or x.delete(), state)
            state = checkpoints.restore(step, shapes)
            break
        except DamagedError as error:
            damaged[step] = error
            step = checkpoints.before(step)
    else:
        raise next(iter(damaged.values()))
    check_finite(
        examine(
            {"weights": state.params, "optimizer": state.opt_state, "ema": state.ema},
            job.setup.everywhere,
        ),
        f"The checkpoint of step {step} in {job.directory.checkpoints}",
        "Delete it to go on from the one before.",
    )
    if damaged:
        for number, place in checkpoints.set_aside(damaged).items():
            # Without the advice for those who have no other.
            job.say(f"Warning: {str(damaged[number]).splitlines()[0]} It is now in {place}.")
    job.say(f"Resuming from the checkpoint of step {step}.")
    changed = {
        f"{name} {described['versions'].get(name)} -> {version}"
        for name, version in versions().items()
        if described["versions"].get(name) != version
    }
    if changed:
        job.say(f"Versions have changed, so numbers may, too: {', '.join(sorted(changed))}.")
    return state, step


def _described(job: Job, checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    """Return what a checkpoint says of its run; raise unless that is this one."""
    described = checkpoints.about(step)
    check_settings(described, step, job.config)
    check_base(described, step, job.setup.model, job.setup.base, job.config.model.source)
    check_data(described, job.setup)
    if note := unchecked(job.directory.checkpoints, step, described):
        job.say(note)
    return described
