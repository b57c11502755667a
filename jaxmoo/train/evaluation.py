"""Held-out scores of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxmoo import mesh
from jaxmoo.evaluate import LanguageScore, evaluate_nll, summarise
from jaxmoo.runtime.processes import everywhere, is_first, place
from jaxmoo.train.job import Job

__all__ = ["evaluate", "stored_scores"]


def stored_scores(job: Job, step: int) -> dict[str, LanguageScore] | None:
    """Return the held-out scores of a step if all of them are stored, for every process to see."""
    stored = job.directory.scores(step)
    complete = stored is not None and set(stored) == set(job.setup.corpus.held_out)
    return stored if everywhere(complete) else None


def evaluate(
    job: Job, step: int, params: Any, say: Callable[[str], None] | None = None
) -> dict[str, LanguageScore]:
    """Return held-out scores of a step: those stored, or computed and stored now.

    Args:
      job: the run.
      step: the steps done.
      params: the trainable parameters after them.
      say: called with the line that sums them up; ``job.say`` by default.

    Raises:
      InterruptedRunError: when the run is asked to stop, between two batches.
    """
    stored = stored_scores(job, step)
    if stored is not None:
        return stored
    config, setup = job.config, job.setup
    sharding = mesh.rows_sharding(setup.device_mesh)

    def nll(batch: Any) -> jax.Array:
        job.point(step)
        return setup.nll(params, setup.frozen, place(batch, sharding))

    # About as many rows as a training step has; the mesh divides them.
    devices = setup.device_mesh.size
    rows = -(-config.data.batch_size * len(config.data.seen) // devices) * devices
    scores = evaluate_nll(
        nll,
        setup.corpus.held_out,
        batch_size=rows,
        pad_id=setup.pad_id,
        progress=is_first(),
    )
    if is_first():
        job.directory.store_scores(step, scores)
    summary = summarise(scores, config.data.seen, config.data.unseen)
    unseen = "" if summary.unseen_nll is None else f", unseen {summary.unseen_nll:.3f}"
    (say or job.say)(
        f"Held-out reply NLL after step {step}: seen {summary.seen_nll:.3f}{unseen}, worst "
        f"{summary.worst} {summary.worst_nll:.3f}"
    )
    return scores
