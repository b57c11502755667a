"""From rows to numbers: which learning rate each arm is reported at, and its scores by seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxmoo.config.study_config import StudyConfig
from jaxmoo.evaluate.measures import MEASURES, summarise_measures
from jaxmoo.study.examples import reported_part
from jaxmoo.study.grid import Cell, Key
from jaxmoo.study.rows import Row

__all__ = ["GROUPS", "Arm", "chosen_rate", "measures_of", "outcomes", "planned", "summary"]

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

    def worst_languages(self, measure: str) -> dict[int, str]:
        """By seed, the language that is worst by a measure."""
        return {
            seed: summary(row, self.part)[measure]["worst_language"]
            for seed, row in self.rows.items()
        }

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


def chosen_rate(
    study: StudyConfig, name: str, rows: Mapping[Key, Row]
) -> tuple[float | None, dict[float, float], tuple[int, ...]]:
    """Choose an arm's learning rate.

    It is that of the lowest NLL over the seen languages on the tuning examples, averaged over the
    tuning seeds, or without any over all seeds, as far as they have all learning rates. Unseen
    languages are never chosen by.

    Args:
      study: the settings.
      name: the arm's.
      rows: those of the grid that there are.

    Returns:
      The rate, None while it cannot be chosen; per rate what it was chosen by; and the seeds.
    """
    rates = study.learning_rates
    seeds = tuple(
        seed
        for seed in study.tuning_seeds or study.seeds
        if all(Key(name, seed, rate) in rows for rate in rates)
    )
    if not seeds:
        return None, {}, ()
    if len(rates) == 1:
        return rates[0], {}, seeds
    tuned = {
        rate: statistics.fmean(
            summary(rows[Key(name, seed, rate)], "tune")["nll"]["seen"] for seed in seeds
        )
        for rate in rates
    }
    return min(tuned, key=tuned.__getitem__), tuned, seeds


def planned(
    study: StudyConfig, cells: Sequence[Cell], rows: Mapping[Key, Row], *, known: bool = False
) -> list[Cell]:
    """Return which runs of a grid a study needs.

    All, or with tuning seeds only those and, of every other seed, the run at the arm's chosen rate.

    Args:
      study: the settings.
      cells: the grid.
      rows: those of the grid that there are.
      known: leave out runs whose rate is not chosen yet; otherwise the first rate stands for it.
    """
    if not study.tuning_seeds:
        return list(cells)
    rates = {arm: chosen_rate(study, arm, rows)[0] for arm in study.arms}
    if not known:
        rates = {arm: rate or study.learning_rates[0] for arm, rate in rates.items()}
    return [
        cell
        for cell in cells
        if cell.key.seed in study.tuning_seeds or cell.key.learning_rate == rates[cell.key.arm]
    ]


def outcomes(study: StudyConfig, rows: Mapping[Key, Row]) -> dict[str, Arm]:
    """Choose every arm's learning rate and gather its rows.

    Where there was something to choose, by :func:`chosen_rate`, the reported numbers are of the
    other examples.

    Args:
      study: the settings.
      rows: those of the grid that there are.

    Returns:
      Per arm, in the order of the settings; an arm whose rate cannot be chosen, or without a run at
      it, is left out.
    """
    rates = study.learning_rates
    part = reported_part(rates)
    found = {}
    for name in study.arms:
        best, tuned, seeds = chosen_rate(study, name, rows)
        if best is None:
            continue
        reported = study.seeds if study.tuning_seeds else seeds
        own = {
            seed: rows[Key(name, seed, best)] for seed in reported if Key(name, seed, best) in rows
        }
        if own:
            found[name] = Arm(name, best, tuned, seeds if tuned else (), own, part)
    return found


def measures_of(row: Row) -> list[str]:
    """Names of the measures that a row has, in the order of `MEASURES`."""
    first = next(iter(row["languages"].values()))["all"]
    return [name for name in MEASURES if name in first]
