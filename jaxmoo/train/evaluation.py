"""Held-out scores of a run, and which of its states is the best by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxmoo.config import Config
from jaxmoo.evaluate import LanguageScore, summarise
from jaxmoo.runtime.processes import everywhere, is_first
from jaxmoo.train.job import Job

__all__ = ["Selection", "evaluate", "stored_scores"]


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
    scores = setup.evaluator.scores(
        (params, setup.frozen),
        setup.corpus.held_out,
        before_batch=lambda: job.point(step),
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


class Selection:
    """Held-out scores of the states that were evaluated, by step; lower is better.

    Only seen languages count: what unseen ones gain is a result, and nothing is chosen by it.

    Args:
      config: the run's settings; ``train.score`` says what a score is, ``train.patience`` how long
        to go on without a better one.

    Example:
      >>> import dataclasses
      >>> from jaxmoo.config import DataConfig, TrainConfig
      >>> config = Config(data=DataConfig(seen=["en"]), train=TrainConfig(patience=2))
      >>> selection = Selection(config)
      >>> for step, nll in ((10, 2.0), (20, 1.5), (30, 1.6), (40, 1.7)):
      ...     selection.add(step, {"en": LanguageScore(nll, 1.0, 9, 9, 1)})
      >>> selection.best, selection.exhausted
      (20, True)
    """

    def __init__(self, config: Config) -> None:
        self._seen, self._score = config.data.seen, config.train.score
        self._patience = config.train.patience
        self.scores: dict[int, float] = {}

    def add(self, step: int, scores: Mapping[str, LanguageScore]) -> None:
        """Take note of the held-out scores of a step."""
        seen = {code: scores[code] for code in self._seen}
        summary = summarise(seen, self._seen)
        self.scores[step] = summary.worst_nll if self._score == "worst" else summary.seen_nll

    @property
    def best(self) -> int | None:
        """The step with the lowest score, the first of equals; None before any."""
        return min(sorted(self.scores), key=self.scores.__getitem__, default=None)

    @property
    def exhausted(self) -> bool:
        """Whether as many evaluations as allowed have passed since the best one."""
        if self._patience is None or self.best is None:
            return False
        return sum(step > self.best for step in self.scores) >= self._patience
