"""Rows of metrics of a run, and the check that its numbers are finite."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmoo.config import schema
from jaxmoo.data.batches import Counts
from jaxmoo.errors import DataError, JaxmooError
from jaxmoo.evaluate import LanguageScore
from jaxmoo.runs.gram_log import write_grams
from jaxmoo.runtime.processes import is_first
from jaxmoo.train.job import Job
from jaxmoo.train.metrics import MetricsWriter
from jaxmoo.train.optimizer import learning_rate
from jaxmoo.train.progress import Progress
from jaxmoo.train.throughput import peak_flops
from jaxmoo.train.trackers import trackers_of

__all__ = ["NonFiniteLossError", "Reporter", "StepDone"]


class NonFiniteLossError(JaxmooError, FloatingPointError):
    """A loss or gradient is NaN or infinite."""

    exit_code = 1


class StepDone(NamedTuple):
    """A step that was sent to the devices.

    Attributes:
      step: its number, from 1.
      counts: of its batch; see :class:`jaxmoo.data.batches.Counts`. Where processes read different
        languages, one array [4, K] that all of them can read.
      metrics: what it measures; see :func:`jaxmoo.train.step.make_train_step`.
      begun: when it was sent, by ``time.perf_counter``.
      unread: why this process could not read its rows; None if it could.
    """

    step: int
    counts: Counts | jax.Array
    metrics: Mapping[str, jax.Array]
    begun: float
    unread: Exception | None = None


class Reporter:
    """Reads what steps measure, checks it and writes it down, one step behind the devices.

    Every process reads and checks; the first one writes.

    Args:
      job: the run.
      start: steps already done.
      skipped: per language the steps so far in which it was left out [K].
      saved: gives the step of the newest checkpoint, if any, for a person to know.
    """

    def __init__(
        self, job: Job, start: int, skipped: np.ndarray, saved: Callable[[], int | None]
    ) -> None:
        self._job, self._start, self._skipped, self._saved = job, start, skipped, saved
        self._pending: StepDone | None = None
        self._told_of_zero = False
        self._rate = learning_rate(job.config.optimizer, job.config.train.steps)
        self._read_at = 0.0
        self._parts = dict(job.clock.seconds)
        peak = job.config.train.peak_tflops
        one = peak_flops(job.setup.device_mesh.devices.flat[0]) if peak is None else peak * 1e12
        self._peak = None if one is None else one * job.setup.device_mesh.size

    def __enter__(self) -> Reporter:
        self._open = contextlib.ExitStack()
        self._metrics: MetricsWriter | None = None
        if is_first():
            config, steps = self._job.config, self._job.config.train.steps
            self._metrics = self._open.enter_context(
                MetricsWriter(
                    self._job.directory.path,
                    trackers_of(config),
                    resume_step=self._start or None,
                    settings=schema.values(config),
                )
            )
            self._progress = self._open.enter_context(
                Progress(steps, start=self._start, doing=lambda: self._job.clock.current)
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def step(self, done: StepDone) -> None:
        """Take note of a step; read the one before, which the devices have finished, or soon will.

        Raises:
          NonFiniteLossError: a number is not finite that has to be.
          DataError: a process could not read its rows of the step before.
        """
        self.flush()
        # The devices compute it, too: sent now, it is there before the step that is sent next.
        rate = self._rate(done.step - 1)
        self._pending = done._replace(metrics={**done.metrics, "learning_rate": rate})

    def flush(self) -> None:
        """Wait for the last step and read what it measured.

        Raises:
          NonFiniteLossError: a number is not finite that has to be.
          DataError: a process could not read its rows of that step.
        """
        if self._pending is None:
            return
        done, self._pending = self._pending, None
        counts = Counts(*jax.device_get(done.counts))
        self._check_read(done, counts.unread)
        recorded = self._metrics is not None and self._records_grams(done.step)
        # The largest of them by far is fetched only when it is wanted.
        left = () if recorded else ("gram",)
        measured = jax.device_get({k: x for k, x in done.metrics.items() if k not in left})
        # The devices began with it when it was sent, or when they were done with the one before.
        now, began = time.perf_counter(), max(done.begun, self._read_at)
        self._read_at = now
        if done.step > self._start + 1:  # the first step's time is the compiler's
            self._job.clock.add("step", now - began)
        self._check_finite(done.step, measured)
        self._tell_of_zero(done.step, measured)
        if self._metrics is not None:
            row = self._row(done, counts, measured, now - began)
            self._progress.update(row)
            self._metrics.write(row)
        if recorded:
            names, seen = self._job.setup.gradients.partition.names, self._job.config.data.seen
            write_grams(self._job.directory.grams, done.step, names, seen, measured["gram"])

    def _records_grams(self, step: int) -> bool:
        settings = self._job.config.train
        every = settings.gram_every
        return every > 0 and (step in (1, settings.steps) or step % every == 0)

    def held_out(self, step: int, scores: Mapping[str, LanguageScore]) -> None:
        """Write down the held-out scores of a step."""
        if self._metrics is not None:
            held_out = {code: score.nll for code, score in scores.items()}
            self._metrics.write({"step": step, "time": _now(), "held_out": held_out})

    def message(self, text: str) -> None:
        """Show a line for a person to read."""
        if self._metrics is not None:
            self._progress.message(text)

    def _row(
        self,
        done: StepDone,
        counts: Counts,
        measured: Mapping[str, np.ndarray],
        seconds: float,
    ) -> dict[str, Any]:
        config, part = self._job.config, self._job.setup.gradients.partition
        batches, seen = self._job.setup.batches, config.data.seen
        here = batches.in_step(done.step - 1)
        number = [seen.index(code) for code in here]
        tokens = int(counts.tokens.sum())
        cosine = np.full((len(seen), len(seen)), np.nan, np.float32)
        cosine[np.ix_(number, number)] = measured["cosine"][np.ix_(number, number)]

        def by_language(values: np.ndarray) -> dict[str, Any]:
            return dict(zip(here, values[number], strict=True))

        row = {
            "step": done.step,
            "time": _now(),
            "loss": by_language(measured["loss"]),
            "mean_loss": measured["loss"][number].mean(),
            "epochs": dict(zip(seen, map(float, counts.epochs), strict=True)),
            "learning_rate": float(measured["learning_rate"]),
            "tokens": tokens,
            "language_tokens": dict(zip(here, counts.tokens, strict=True)),
            "step_seconds": seconds,
            "grad_norm": measured["grad_norm"],
            "conflict_share": measured["conflict"].mean(),
            "weights": by_language(measured["weights"].mean(0)),
            "cosine": cosine,
            **(
                {"loss_weights": by_language(measured["loss_weights"])}
                if "loss_weights" in measured
                else {}
            ),
            **({"gram_error": measured["gram_error"].mean()} if "gram_error" in measured else {}),
            "language_norm": by_language(measured["language_norm"]),
            "language_conflict": by_language(measured["language_conflict"]),
            **(
                {"malformed": dict(zip(seen, counts.malformed, strict=True))}
                if len(counts.malformed)
                else {}
            ),
            "skipped": dict(zip(seen, measured["skipped"], strict=True)),
            "seconds": self._seconds(),
            "goodput": self._job.clock.goodput(),
        }
        memory = self._job.setup.device_mesh.local_devices[0].memory_stats()
        if memory:
            row["device_memory_peak"] = memory["peak_bytes_in_use"]
        if done.step > self._start + 1:
            row["tokens_per_second"] = tokens / seconds
            if self._peak:
                row["mfu"] = self._job.setup.flops / seconds / self._peak
        if done.step % config.train.log_every == 0 or done.step == config.train.steps:
            row["blocks"] = {
                name: {
                    "conflict_share": measured["conflict"][i],
                    "update_norm": measured["update_norm"][i],
                    "mean_norm": measured["mean_norm"][i],
                }
                for i, name in enumerate(part.names)
            }
        return row

    def _seconds(self) -> dict[str, float]:
        """What the host's parts took since the last row; they overlap with the devices' work."""
        now = {k: v for k, v in self._job.clock.seconds.items() if k != "step"}
        spent = {name: total - self._parts.get(name, 0.0) for name, total in now.items()}
        self._parts = now
        return spent

    def _tell_of_zero(self, step: int, measured: Mapping[str, np.ndarray]) -> None:
        """Say once that a step's gradient is zero."""
        if self._told_of_zero or measured["grad_norm"] != 0:
            return
        self._told_of_zero = True
        which = "those of the languages are not: look at resolve.aggregator and resolve.options."
        if not measured["language_norm"].any():
            which = "so are those of all languages: look at model.trainable and the data."
        self.message(f"Note: the resolved gradient of step {step} is zero; {which}")

    def _check_read(self, done: StepDone, unread: np.ndarray) -> None:
        """Stop the run, in all processes, when one could not read its rows."""
        if not unread.any():
            return
        seen = self._job.config.data.seen
        lacking = ", ".join(code for code, one in zip(seen, unread, strict=True) if one)
        raise done.unread or DataError(
            f"The process that reads {lacking} cannot go on after step {done.step - 1}; its own "
            "output says why."
        )

    def _check_finite(self, step: int, measured: Mapping[str, np.ndarray]) -> None:
        """Stop the run when languages whose numbers are not finite may not be left out."""
        config = self._job.config
        seen = config.data.seen
        skipped = measured["skipped"] - self._skipped
        self._skipped = measured["skipped"]
        here = self._job.setup.batches.in_step(step - 1)
        bad = [code for code in here if not np.isfinite(measured["loss"][seen.index(code)])]
        what = f"The loss of {', '.join(bad)}"
        if config.resolve.nonfinite == "skip" and len(bad) < len(here):
            return
        if not bad:
            if not skipped.any():
                return
            left_out = [c for c, s in zip(seen, skipped, strict=True) if s]
            what = f"The gradient of {', '.join(left_out)}"
        latest = self._saved()
        saved = (
            "No checkpoint had been saved."
            if latest is None
            else f"The checkpoint of step {latest} is untouched."
        )
        advice = (
            "Lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or use "
            "model.dtype=float32."
        )
        if step == self._start + 1:  # nothing has been learnt that could be wrong
            begun = f"the checkpoint of step {self._start}" if self._start else "the model"
            advice = (
                f"It is the first step from {begun}: no learning rate is at fault but the weights, "
                f"the data or, if model.dtype is not float32, that."
            )
        raise NonFiniteLossError(f"{what} is not finite in step {step}. {saved} {advice}")


def _now() -> str:
    """Date and time, as everybody reads them."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
