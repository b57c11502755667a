"""The steps of a run, and what happens between them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxmoo import mesh
from jaxmoo.config.interval import parse_interval
from jaxmoo.data.batches import Counts
from jaxmoo.evaluate import LanguageScore
from jaxmoo.runs.checkpoint import Checkpoints
from jaxmoo.runtime.processes import place
from jaxmoo.runtime.profile import ProfileWindow
from jaxmoo.runtime.signals import InterruptedRunError
from jaxmoo.train.condition import Condition, examine, unchanged
from jaxmoo.train.evaluation import Selection, evaluate, stored_scores
from jaxmoo.train.job import Job
from jaxmoo.train.reporter import Reporter, StepDone
from jaxmoo.train.resume import about
from jaxmoo.train.setup import step_spec
from jaxmoo.train.step import TrainState

__all__ = ["Loop"]

_SOON = 10  # steps after which weights that stand still are noticed


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
        settings = job.config.train
        self._selection = Selection(job.config)
        self._unread: Exception | None = None  # why this process cannot read its rows
        self._told: int | None = None  # the step whose scores are in the metrics
        self._steps_between = parse_interval(settings.checkpoint_every).steps
        every = settings.evaluate_every
        for step in range(every, min(done + 1, settings.steps), every) if every else ():
            scores = stored_scores(job, step)
            if scores is not None:
                self._note(step, scores)
        data = job.config.data
        self._rows = mesh.local_rows(job.setup.device_mesh, data.step_languages, data.batch_size)
        self._profile = ProfileWindow(
            job.directory.profile, settings.profile_from, settings.profile_steps
        )

    def run(self) -> tuple[TrainState, int]:
        """Train; return the chosen state and its step; it is saved.

        Raises:
          InterruptedRunError: when the run is asked to stop; the state is saved.
          NonFiniteLossError: a loss is NaN or infinite; the state is not saved.
          UnsavedError: a checkpoint cannot be written.
        """
        job = self._job
        # A run may have been stopped between its last step and the evaluation of that.
        scores = stored_scores(job, self._done)
        if self._goes_on() or scores is None:
            skipped = job.setup.gradients.diagnostics(self._state.resolver).skipped
            latest = self._checkpoints.latest
            begun, weights = self._done, self._examined()
            with (
                job.setup.batches.reading_ahead(),
                Reporter(job, self._done, jax.device_get(skipped), latest) as reporter,
            ):
                if scores is None:
                    self._evaluate(reporter)  # what an interrupted run did not come to
                else:
                    self._tell(reporter, scores)
                if self._goes_on():
                    job.say("Compiling the training step ...")
                    job.saves.restart()
                while self._goes_on():
                    self._profile.before(self._done + 1, reporter.flush)
                    self._step(reporter)
                    if self._done == begun + _SOON and self._goes_on():
                        self._tell_of_standstill(reporter, weights, begun)
                self._profile.close(reporter.flush)
                self._tell_of_standstill(reporter, weights, begun)
                self._evaluate_last(reporter)
        self._save()
        self._note(self._done, evaluate(job, self._done, self._state.weights))
        self._checkpoints.wait()
        return self._select()

    def _evaluate_last(self, reporter: Reporter) -> None:
        """Evaluate the last state, if that was not done: a run may end early with an evaluation.

        The scores may be there although the checkpoint is not: from a run that could not save it.
        """
        if self._told != self._done:
            self._save()
            with self._job.clock.part("evaluate"):
                weights = self._state.weights
                scores = evaluate(self._job, self._done, weights, reporter.message)
            self._tell(reporter, scores)

    def _tell(self, reporter: Reporter, scores: Mapping[str, LanguageScore]) -> None:
        reporter.held_out(self._done, scores)
        self._told = self._done

    def _examined(self) -> dict[str, Condition]:
        return examine(self._state.params, self._job.setup.everywhere)

    def _tell_of_standstill(
        self, reporter: Reporter, weights: dict[str, Condition], begun: int
    ) -> None:
        """Say so when steps have not changed any weight."""
        if self._done > begun and unchanged(weights, self._examined()):
            reporter.message(
                f"Note: no weight has changed in steps {begun + 1} to {self._done}. What an update "
                "adds is zero or less than model.param_dtype resolves: look at "
                "optimizer.learning_rate, resolve.options and grad_norm in the metrics."
            )

    def _goes_on(self) -> bool:
        return self._done < self._job.config.train.steps and not self._selection.exhausted

    def _note(self, step: int, scores: Mapping[str, LanguageScore]) -> None:
        self._selection.add(step, scores)
        self._checkpoints.score(step, self._selection.scores[step])

    def _select(self) -> tuple[TrainState, int]:
        job, settings = self._job, self._job.config.train
        if self._done < settings.steps:
            job.say(
                f"Ended after step {self._done} of {settings.steps}: no better score than that of "
                f"step {self._selection.best} in {settings.patience} evaluations."
            )
        best = self._checkpoints.best()
        if settings.select == "last" or best in (None, self._done):
            return self._state, self._done
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, self._state)
        jax.tree.map(lambda x: x.delete(), self._state)
        job.say(f"The best score is that of step {best}.")
        return self._checkpoints.restore(best, shapes), best

    def _step(self, reporter: Reporter) -> None:
        job, setup = self._job, self._job.setup
        with job.clock.part("data"):
            batch, counts = self._read()
            placed = place(batch, mesh.batch_sharding(setup.device_mesh))
        begun = time.perf_counter()
        self._state, metrics = setup.step(self._state, setup.frozen, placed)
        self._done += 1
        reporter.step(StepDone(self._done, counts, metrics, begun, self._unread))
        try:
            job.point(self._done)
        except InterruptedRunError:
            reporter.flush()
            self._save()
            raise
        settings = job.config.train
        due = job.saves.take() or _due(self._done, self._steps_between)
        if due or self._done == settings.steps:
            reporter.flush()
            self._save()
        self._evaluate(reporter)

    def _read(self) -> tuple[dict[str, np.ndarray], Any]:
        """This process's rows of the next step, and what is counted of them.

        Where processes read different streams and one of them cannot, it goes on with empty rows
        until all know, which is before the state is saved: they end alike, and do not wait for it.
        """
        batches, step = self._job.setup.batches, self._done
        if batches.readers is None:
            return batches.batch(step, self._rows), batches.counts(step, self._rows)
        if self._unread is None:
            try:
                batch, counts = batches.batch(step, self._rows), batches.counts(step, self._rows)
                return batch, self._job.agreement.largest(np.stack(counts))
            except InterruptedRunError:
                raise
            except Exception as error:  # of a network, or a source of the user's, any
                self._unread = error
        spec = step_spec(self._job.config.data)
        empty = {name: np.zeros(shape, dtype) for name, (shape, dtype) in spec.items()}
        counts = Counts(*np.zeros((4, len(batches.languages)), np.int64))
        counts.unread[:] = [language in batches.readers.mine for language in batches.languages]
        return empty, self._job.agreement.largest(np.stack(counts))

    def _save(self) -> None:
        if self._checkpoints.latest() != self._done:
            described = about(self._job.config, self._job.setup, self._done)
            with self._job.clock.part("checkpoint"):
                self._checkpoints.save(self._done, self._state, described)
        self._job.saves.restart()

    def _evaluate(self, reporter: Reporter) -> None:
        """Evaluate if it is time; the first and the last state are evaluated elsewhere."""
        settings = self._job.config.train
        if self._done in (0, settings.steps) or not _due(self._done, settings.evaluate_every):
            return
        reporter.flush()
        try:
            with self._job.clock.part("evaluate"):
                scores = evaluate(self._job, self._done, self._state.weights, reporter.message)
        except InterruptedRunError:
            self._save()
            raise
        self._note(self._done, scores)
        if settings.select == "best" and self._selection.best == self._done:
            self._save()
        self._tell(reporter, scores)


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
