"""The steps of a run, and what happens between them."""

from __future__ import annotations

import time

import jax

from jaxmoo import mesh
from jaxmoo.evaluate import summarise
from jaxmoo.train.checkpoint import Checkpoints
from jaxmoo.train.distributed import place
from jaxmoo.train.evaluation import evaluate
from jaxmoo.train.job import Job
from jaxmoo.train.provenance import about
from jaxmoo.train.reporter import Reporter, StepDone
from jaxmoo.train.signals import InterruptedRunError
from jaxmoo.train.step import TrainState

__all__ = ["Loop"]


class Loop:
    """Trains from a state to the last step.

    The devices do not wait for the host: what a step measured is read while the next one runs. All
    that was measured is read and checked before a state is saved or evaluated.

    Args:
      job: the run.
      checkpoints: where states are saved.
      state: the state to begin with; consumed.
      done: the steps it has behind it.
    """

    def __init__(self, job: Job, checkpoints: Checkpoints, state: TrainState, done: int) -> None:
        self._job, self._checkpoints = job, checkpoints
        self._state, self._done = state, done

    def run(self) -> TrainState:
        """Train; return the final state, which is saved.

        Raises:
          InterruptedRunError: when the run is asked to stop; the state is saved.
          NonFiniteLossError: a loss is NaN or infinite; the state is not saved.
          UnsavedError: a checkpoint cannot be written.
        """
        job, steps = self._job, self._job.config.train.steps
        if self._done < steps:
            skipped = job.setup.gradients.diagnostics(self._state.resolver).skipped
            latest = self._checkpoints.latest
            with Reporter(job, self._done, jax.device_get(skipped), latest) as reporter:
                self._evaluate(reporter)  # what an interrupted run did not come to
                job.say("Compiling the training step ...")
                while self._done < steps:
                    self._step(reporter)
        self._checkpoints.wait()
        return self._state

    def _step(self, reporter: Reporter) -> None:
        job, setup = self._job, self._job.setup
        batch = setup.batches.batch(self._done)
        placed = place(batch, mesh.batch_sharding(setup.device_mesh))
        begun = time.perf_counter()
        self._state, metrics = setup.step(self._state, setup.frozen, placed)
        self._done += 1
        reporter.step(StepDone(self._done, batch, metrics, begun))
        try:
            job.point(self._done)
        except InterruptedRunError:
            reporter.flush()
            self._save()
            raise
        settings = job.config.train
        if self._done == settings.steps or _due(self._done, settings.checkpoint_every):
            reporter.flush()
            self._save()
        self._evaluate(reporter)

    def _save(self) -> None:
        described = about(self._job.config, self._job.setup, self._done)
        self._checkpoints.save(self._done, self._state, described)

    def _evaluate(self, reporter: Reporter) -> None:
        """Evaluate if it is time; the first and the last state are evaluated elsewhere."""
        settings = self._job.config.train
        if self._done in (0, settings.steps) or not _due(self._done, settings.evaluate_every):
            return
        reporter.flush()
        try:
            scores = evaluate(self._job, self._done, self._state.params, reporter.message)
        except InterruptedRunError:
            self._save()
            raise
        self._checkpoints.score(self._done, summarise(scores, self._job.config.data.seen).seen_nll)
        reporter.held_out(self._done, scores)


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
