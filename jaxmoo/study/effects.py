"""What arms gain over the baseline: paired differences, and what they show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxmoo.evaluate.measures import MEASURES, quotient
from jaxmoo.evaluate.results import LanguageResult
from jaxmoo.study.examples import unpack_examples
from jaxmoo.study.outcome import GROUPS, Arm
from jaxmoo.study.rows import Row
from jaxmoo.study.statistics import (
    Components,
    Estimate,
    Influence,
    components,
    estimate,
    holm,
)

__all__ = ["KINDS", "Effects", "Verdict", "verdicts"]

_SIGNIFICANT = 0.05

KINDS = ("better", "equivalent", "undecided", "not better", "worse")


class Verdict(NamedTuple):
    """What a comparison shows.

    Attributes:
      estimate: the arm's difference to the baseline.
      p: of the test that there is none, adjusted for the number of arms.
      p_equivalent: of the test that it is the smallest effect or more, adjusted likewise; not a
        number where no smallest effect is set.
      higher_is_better: the measure's direction.
      kind: one of `KINDS`.
    """

    estimate: Estimate
    p: float
    p_equivalent: float
    higher_is_better: bool
    kind: str

    @property
    def mean_gain(self) -> float:
        """How much better the arm is: the mean difference, whatever the measure's direction."""
        return self.estimate.mean if self.higher_is_better else -self.estimate.mean

    @property
    def gain(self) -> float:
        """How much the arm may still be worth: the largest gain within the 95 % interval.

        It is 0 or below where any gain is excluded.
        """
        return self.mean_gain + self.estimate.half


def verdicts(
    estimates: Mapping[str, Estimate], higher_is_better: bool, smallest: float | None
) -> dict[str, Verdict]:
    """Say of every arm what its difference to the baseline shows.

    An arm is *equivalent* if its difference is surely smaller than the smallest effect worth
    having, in both directions (it may still differ); else *better* or *worse* if there surely is a
    difference; else *not better* if a gain of the smallest effect is surely excluded; else
    *undecided*.
    Surely: p below 0.05, adjusted by Holm's rule over the arms.

    Args:
      estimates: per arm its difference.
      higher_is_better: the measure's direction.
      smallest: the smallest effect worth having; None where none is set.

    Example:
      >>> found = {
      ...     "a": Estimate(-0.2, 0.01, 9, (0.0,) * 5),
      ...     "b": Estimate(0.0, 0.01, 9, (0.0,) * 5),
      ...     "c": Estimate(0.1, 0.1, 9, (0.0,) * 5),
      ... }
      >>> {arm: one.kind for arm, one in verdicts(found, False, 0.05).items()}
      {'a': 'better', 'b': 'equivalent', 'c': 'undecided'}
    """
    sign = 1 if higher_is_better else -1
    gains = {arm: one._replace(mean=sign * one.mean) for arm, one in estimates.items()}
    p = holm({arm: one.p for arm, one in gains.items()})
    bound = math.nan if smallest is None else smallest
    equal = holm({arm: one.p_equivalent(bound) for arm, one in gains.items()})
    below = holm({arm: one.p_below(bound) for arm, one in gains.items()})
    found = {}
    for arm, gain in gains.items():
        if equal[arm] < _SIGNIFICANT:
            kind = "equivalent"
        elif p[arm] < _SIGNIFICANT:
            kind = "better" if gain.mean > 0 else "worse"
        elif below[arm] < _SIGNIFICANT:
            kind = "not better"
        else:
            kind = "undecided"
        found[arm] = Verdict(estimates[arm], p[arm], equal[arm], higher_is_better, kind)
    return found


class Effects:
    """Differences of arms to the baseline, with uncertainty from all that is drawn.

    Args:
      arms: by name, with the baseline; at least one.
      baseline: the name of the arm that is subtracted.
      base: the row of the model before training; None where there is none.
      other_languages: by default, count languages as drawn, for claims about others.
    """

    def __init__(
        self,
        arms: Mapping[str, Arm],
        baseline: str,
        base: Row | None,
        *,
        other_languages: bool = True,
    ):
        self.arms = arms
        self.baseline = baseline
        self.other_languages = other_languages
        self._examples = {
            name: {seed: unpack_examples(row, base, arm.part) for seed, row in arm.rows.items()}
            for name, arm in arms.items()
        }

    @property
    def row(self) -> Row:
        """One of the rows, all of which are of the same languages and measures."""
        return next(iter(next(iter(self.arms.values())).rows.values()))

    @property
    def part(self) -> str:
        """Which part of the held-out examples is reported, of all arms."""
        return next(iter(self.arms.values())).part

    @property
    def of_examples(self) -> bool:
        """Whether all rows have single examples."""
        return all(one is not None for rows in self._examples.values() for one in rows.values())

    def seeds(self, name: str) -> list[int]:
        """Seeds that an arm and the baseline have in common."""
        if self.baseline not in self.arms:
            return []
        return [seed for seed in self.arms[self.baseline].rows if seed in self.arms[name].rows]

    def others(self) -> list[str]:
        """Arms other than the baseline that can be compared with it."""
        return [name for name in self.arms if name != self.baseline and self.seeds(name)]

    def difference(
        self, name: str, measure: str, group: str, *, other_languages: bool | None = None
    ) -> Estimate:
        """Return an arm's difference in a group of languages.

        Args:
          name: the arm.
          measure: one of `jaxmoo.evaluate.measures.MEASURES`.
          group: ``seen``, ``unseen``, ``worst``, or a language.
          other_languages: count languages as drawn; None: as by default.
        """
        drawn = self.other_languages if other_languages is None else other_languages
        return estimate(*self._parts(name, measure, group), other_languages=drawn)

    def components(self, name: str, measure: str, group: str) -> Components:
        """Return what the variance of an arm's difference consists of; as `difference`."""
        return components(*self._parts(name, measure, group))

    def _parts(self, name: str, measure: str, group: str) -> tuple[np.ndarray, list[Influence]]:
        arm, like = self.arms[name], self.arms[self.baseline]
        seeds = self.seeds(name)
        if group == "worst":
            ours, theirs = arm.scores(measure, group), like.scores(measure, group)
            differences = np.array([[ours[seed] - theirs[seed]] for seed in seeds])
            codes = list(self.row["languages"])
        else:
            codes = list(self.row[group]) if group in GROUPS else [group]
            columns = [
                (arm.language(measure, code), like.language(measure, code)) for code in codes
            ]
            differences = np.array([[a[seed] - b[seed] for a, b in columns] for seed in seeds])
        found = [[self._examples[one][seed] for seed in seeds] for one in (name, self.baseline)]
        examples = [[one for one in side if one is not None] for side in found]
        if any(len(side) < len(seeds) for side in examples):
            return differences, []
        influences = []
        worst = [one.worst_languages(measure) for one in (arm, like)] if group == "worst" else []
        for code in codes:
            a, b = (np.array([_influence(measure, one[code]) for one in side]) for side in examples)
            if worst:
                # Only the worst language counts, which may be another one in each run.
                a, b = (
                    one * np.array([[code == found[seed]] for seed in seeds])
                    for one, found in zip((a, b), worst, strict=True)
                )
            influences.append(Influence(a - b, examples[0][0][code].units))
        if worst:
            values = np.hstack([one.values for one in influences])
            units = [unit for one in influences for unit in one.units]
            influences = [Influence(values, units)]
        return differences, influences


def _influence(measure: str, result: LanguageResult) -> np.ndarray:
    """How much each example moves a score: the first order of leaving it in."""
    above, below = quotient(result.columns, measure)
    scale = MEASURES[measure].scale
    return scale * (above - above.sum() / below.sum() * below) / below.sum()
