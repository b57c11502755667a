"""From rows to numbers: which learning rate each arm is reported at, and its scores by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxmoo.config.study_config import StudyConfig
from jaxmoo.evaluate.measures import MEASURES, summarise_measures
from jaxmoo.study.examples import reported_part
from jaxmoo.study.grid import Key
from jaxmoo.study.rows import Row

__all__ = ["GROUPS", "Arm", "outcomes", "summary"]

GROUPS = ("seen", "unseen", "worst")


class Arm(NamedTuple):
    """What is reported of one arm.

    Attributes:
      name: its name.
      learning_rate: the one it is reported at.
      tuned: per learning rate the seen mean of NLL on the tuning examples, over `tuned_seeds`.
      tuned_seeds: seeds with all learning rates; empty when there was nothing to choose.
      rows: per seed its row at that learning rate.
      part: which part of the held-out examples is reported.
    """

    name: str
    learning_rate: float
    tuned: dict[float, float]
    tuned_seeds: tuple[int, ...]
    rows: dict[int, Row]
    part: str

    def scores(self, measure: str, group: str) -> dict[int, float]:
        """By seed, a measure's mean over seen or unseen languages, or of the worst language."""
        found = {seed: summary(row, self.part)[measure] for seed, row in self.rows.items()}
        return {seed: one[group] for seed, one in found.items() if group in one}

    def language(self, measure: str, code: str) -> dict[int, float]:
        """By seed, a measure of one language."""
        return {seed: row["languages"][code][self.part][measure] for seed, row in self.rows.items()}


def summary(row: Row, part: str) -> dict[str, dict[str, Any]]:
    """Return the means over languages of a row's scores on a part of the held-out examples.

    Args:
      row: the row.
      part: one of `jaxmoo.study.examples.PARTS`.

    Returns:
      As `jaxmoo.evaluate.measures.summarise_measures`.
    """
    scores = {code: parts[part] for code, parts in row["languages"].items()}
    return summarise_measures(scores, row["seen"], row["unseen"])


def outcomes(study: StudyConfig, rows: Mapping[Key, Row]) -> dict[str, Arm]:
    """Choose every arm's learning rate and gather its rows.

    An arm's learning rate is that of the lowest NLL over the seen languages on the tuning
    examples, averaged over the seeds that have all learning rates. The reported numbers are of the
    other examples. Unseen languages are never chosen by.

    Args:
      study: the settings.
      rows: those of the grid that there are.

    Returns:
      Per arm, in the order of the settings; an arm without a seed that has all learning rates is
      left out.
    """
    rates = study.learning_rates
    part = reported_part(rates)
    found = {}
    for name in study.arms:
        complete = tuple(
            seed for seed in study.seeds if all(Key(name, seed, rate) in rows for rate in rates)
        )
        if not complete:
            continue
        tuned: dict[float, float] = {}
        if len(rates) > 1:
            tuned = {
                rate: math.fsum(
                    summary(rows[Key(name, seed, rate)], "tune")["nll"]["seen"] for seed in complete
                )
                / len(complete)
                for rate in rates
            }
        best = min(tuned, key=tuned.__getitem__) if tuned else rates[0]
        own = {seed: rows[Key(name, seed, best)] for seed in complete}
        found[name] = Arm(name, best, tuned, complete if tuned else (), own, part)
    return found


def measures_of(rows: Sequence[Row]) -> list[str]:
    """Names of the measures that rows have, in the order of `MEASURES`."""
    first = next(iter(rows[0]["languages"].values()))["all"]
    return [name for name in MEASURES if name in first]
