"""How small a difference a study can find: from the noise of runs that there are, as of a pilot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import special

from jaxmoo.errors import DataError
from jaxmoo.evaluate.measures import MEASURES
from jaxmoo.study.effects import Effects
from jaxmoo.study.parts import Part, Table
from jaxmoo.study.statistics import satterthwaite

__all__ = ["Noise", "detectable", "noise", "power_section"]

_SEEDS = (3, 5, 8, 12, 20)
_EXAMPLES = (50, 100, 200, 500, 1000)
_POWER = 0.8


class Noise(NamedTuple):
    """Variances of a difference, of a mean over languages.

    Attributes:
      seeds: between seeds, of one run, without what its examples add.
      languages: of the mean over as many languages as there are, without their examples; 0 for
        claims about these languages.
      examples: of the mean over as many examples as there are, the same ones in all seeds.
      by_run: what examples add to a single run.
      number: of examples per language.
      of_languages: how many there are.
      units: how many examples are drawn independently, in all languages.
    """

    seeds: float
    languages: float
    examples: float
    by_run: float
    number: int
    of_languages: int
    units: int


def noise(effects: Effects, measure: str, group: str) -> Noise:
    """Estimate the noise of differences, the middle one of all arms.

    Args:
      effects: rows with at least two seeds that arms and baseline share.
      measure: one of `jaxmoo.evaluate.measures.MEASURES`.
      group: ``seen``, ``unseen`` or ``worst``.

    Raises:
      DataError: no arm shares two seeds with the baseline.
    """
    names = [name for name in effects.others() if len(effects.seeds(name)) > 1]
    if not names:
        raise DataError(
            "Noise is known from two seeds on: no arm has two that the baseline has as well. Run "
            "more seeds."
        )
    parts = [effects.components(name, measure, group) for name in names]
    own = []
    for one in parts:
        within = one.examples - one.shared
        spread = 0.0
        if one.languages > 1 and effects.other_languages:
            between = (one.by_language - one.by_both) / one.seeds
            spread = max(0.0, between / one.languages - within)
        own.append((max(0.0, one.by_seed / one.languages - one.by_run), spread))
    examples = [of[effects.part]["examples"] for of in effects.row["languages"].values()]
    return Noise(
        seeds=statistics.median(seeds for seeds, _ in own),
        languages=statistics.median(languages for _, languages in own),
        examples=statistics.median(one.examples for one in parts),
        by_run=statistics.median(one.by_run for one in parts),
        number=round(statistics.median(examples)),
        of_languages=parts[0].languages,
        units=parts[0].units,
    )


def detectable(found: Noise, seeds: int, examples: int, *, equivalence: bool = False) -> float:
    """Return the smallest difference that eight of ten such studies would find.

    Args:
      found: the noise.
      seeds: of every arm.
      examples: held out per language.
      equivalence: instead the smallest effect that eight of ten studies would exclude, in both
        directions, if there is no difference at all.

    Returns:
      The difference, by t-tests at 5 % that are not adjusted for the number of arms.

    Example:
      >>> pilot = Noise(0.01**2, 0.0, 0.01**2, 0.0, 100, 8, 800)
      >>> [round(detectable(pilot, seeds, 400), 3) for seeds in (3, 5, 20)]
      [0.026, 0.02, 0.015]
    """
    more = examples / found.number
    terms = [
        ((found.seeds + found.by_run / more) / seeds, seeds - 1),
        (found.languages, found.of_languages - 1),
        (found.examples / more, found.units * more - 1),
    ]
    variance, freedom = satterthwaite(terms)
    if variance == 0:
        return 0.0
    # Of equivalence both one-sided tests have to reject.
    level, power = (0.95, (1 + _POWER) / 2) if equivalence else (0.975, _POWER)
    return math.sqrt(variance) * float(special.stdtrit(freedom, [level, power]).sum())


def power_section(effects: Effects, measure: str, group: str) -> list[Part]:
    """Describe the noise, and tabulate the smallest differences by seeds and examples.

    Args:
      effects: rows with at least two seeds that arms and baseline share.
      measure: one of `jaxmoo.evaluate.measures.MEASURES`.
      group: ``seen``, ``unseen`` or ``worst``.

    Raises:
      DataError: as `noise`.
    """
    found = noise(effects, measure, group)
    own = {len(effects.seeds(name)) for name in effects.others()}
    seeds = sorted({*_SEEDS, *own} - {1})
    examples: Sequence[int] = [found.number]
    if effects.of_examples:
        examples = sorted({*_EXAMPLES, found.number})
    header = ["seeds", *(f"{number} examples" for number in examples)]
    tables = [
        Table(
            header,
            [
                [n, *(f"{detectable(found, n, e, equivalence=equal):.3f}" for e in examples)]
                for n in seeds
            ],
        )
        for equal in (False, True)
    ]
    label = MEASURES[measure].label
    what = "the worst language" if group == "worst" else f"the {group} mean"
    parts = [f"{math.sqrt(found.seeds):.4f} between seeds"]
    if found.of_languages > 1 and effects.other_languages:
        parts.append(
            f"{math.sqrt(found.languages):.4f} of the mean over {found.of_languages} languages"
        )
    if effects.of_examples:
        parts.append(
            f"{math.sqrt(found.examples):.4f} of the mean over {found.number} examples per "
            f"language, and {math.sqrt(found.by_run):.4f} of them in a single run"
        )
    unknown = (
        ""
        if effects.of_examples
        else " The rows hold no single examples, so it is not known what more of them would change."
    )
    return [
        f"### Power: {label} of {what}",
        f"Noise of a difference to {effects.baseline}, as standard deviations, the middle one of "
        f"all arms: {'; '.join(parts)}.{unknown}",
        "The smallest difference that eight of ten such studies would find (t-test at 5 %, not "
        "adjusted for the number of arms), by seeds and held-out examples per language:",
        tables[0],
        "The smallest effect that eight of ten would exclude in both directions if there is no "
        "difference (two one-sided t-tests at 5 %):",
        tables[1],
    ]
