"""How far a run has come, as its checkpoints tell, and how it goes on from there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmoo.config.training import Config, to_yaml
from jaxmoo.data import LanguageBatches
from jaxmoo.errors import CheckpointError
from jaxmoo.runs.provenance import architecture, versions
from jaxmoo.train.setup import Setup

__all__ = ["about", "batch_digest", "check_data"]


def batch_digest(batches: LanguageBatches, step: int) -> str:
    """Return a fingerprint of the batch of a step."""
    digest = hashlib.sha256()
    for name, array in sorted(batches.batch(step).items()):
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
