"""Which of a run's evaluated states is the best, and when to stop looking for a better one."""

from __future__ import annotations

from collections.abc import Mapping

from jaxmoo.config.training import Config
from jaxmoo.evaluate import LanguageScore, summarise

__all__ = ["Selection"]


class Selection:
    """Held-out scores of the states that were evaluated, by step; lower is better.

    Only seen languages count: what unseen ones gain is a result, and nothing is chosen by it.

    Args:
      config: the run's settings; ``train.score`` says what a score is, ``train.patience`` how long
        to go on without a better one.

    Example:
      >>> import dataclasses
      >>> from jaxmoo.config.training import DataConfig, TrainConfig
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
