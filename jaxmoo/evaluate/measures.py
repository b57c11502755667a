"""What is measured, from numbers per example.

Every measure is a sum over examples divided by another sum over examples, so one definition serves
the scores, their means over languages and the resampling of examples (`jaxmoo.evaluate.compare`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxmoo.data.table import text_table
from jaxmoo.evaluate.intervals import proportion

__all__ = [
    "MEASURES",
    "Measure",
    "measured",
    "quotient",
    "score",
    "summarise_measures",
    "summary_table",
]


class Measure(NamedTuple):
    """One measure.

    Attributes:
      label: its name in tables.
      numerator: column that is summed.
      denominator: column that the sum is divided by; None for the number of examples.
      higher_is_better: the direction.
      scale: factor of the quotient.
      is_share: the share of examples that are right, each 0 or 1.
    """

    label: str
    numerator: str
    denominator: str | None
    higher_is_better: bool
    scale: float = 1.0
    is_share: bool = False


MEASURES = {
    "nll": Measure("NLL", "nats", "tokens", False),
    "bits_per_byte": Measure("bits/byte", "nats", "bytes", False, 1 / math.log(2)),
    "accuracy": Measure("accuracy", "correct", None, True, is_share=True),
    "accuracy_unnormalised": Measure(
        "acc. unnormalised", "correct_unnormalised", None, True, is_share=True
    ),
    "exact_match": Measure("exact match", "exact", None, True, is_share=True),
    "chrf": Measure("chrF", "chrf", None, True),
}

Columns = Mapping[str, Sequence[float]]


def measured(columns: Columns) -> list[str]:
    """Names of the measures that columns allow."""
    return [name for name, measure in MEASURES.items() if measure.numerator in columns]


def score(columns: Columns, name: str) -> float:
    """Compute a measure over all examples.

    Args:
      columns: numbers per example, by name.
      name: one of `MEASURES`.

    Example:
      >>> score({"nats": [2.0, 4.0], "tokens": [1, 3]}, "nll")
      1.5
    """
    measure = MEASURES[name]
    values = columns[measure.numerator]
    below = len(values) if measure.denominator is None else math.fsum(columns[measure.denominator])
    # Exactly rounded, so that the order of the examples leaves no trace.
    return measure.scale * math.fsum(values) / below


def quotient(columns: Columns, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return what a measure sums of each example, and what it divides the sum by the sum of.

    Args:
      columns: numbers per example, by name.
      name: one of `MEASURES`.

    Returns:
      Two arrays [examples], the second of ones where a measure is a mean over examples.

    Example:
      >>> [one.tolist() for one in quotient({"correct": [1, 0]}, "accuracy")]
      [[1.0, 0.0], [1.0, 1.0]]
    """
    measure = MEASURES[name]
    above = np.asarray(columns[measure.numerator], np.float64)
    if measure.denominator is None:
        return above, np.ones_like(above)
    return above, np.asarray(columns[measure.denominator], np.float64)


def summarise_measures(
    scores: Mapping[str, Mapping[str, float]], seen: Sequence[str], unseen: Sequence[str]
) -> dict[str, dict[str, float | str]]:
    """Means over languages, each counting once, and the worst language.

    Args:
      scores: per language its scores by measure.
      seen: languages that were trained on; may be empty.
      unseen: the others.

    Returns:
      Per measure ``seen`` and ``unseen`` (where there are such languages), ``worst`` and
      ``worst_language``.

    Example:
      >>> summarise_measures({"en": {"accuracy": 0.5}, "fa": {"accuracy": 0.25}}, ["en", "fa"], [])
      {'accuracy': {'seen': 0.375, 'worst': 0.25, 'worst_language': 'fa'}}
    """
    summary: dict[str, dict[str, float | str]] = {}
    for name in next(iter(scores.values())):
        if name not in MEASURES:
            continue
        one: dict[str, float | str] = {}
        for group, languages in (("seen", seen), ("unseen", unseen)):
            if languages:
                one[group] = float(np.mean([scores[language][name] for language in languages]))
        sign = -1 if MEASURES[name].higher_is_better else 1
        # What is not a number is worse than any number.
        worst = max(
            scores, key=lambda code: (math.isnan(scores[code][name]), sign * scores[code][name])
        )
        summary[name] = one | {"worst": scores[worst][name], "worst_language": worst}
    return summary


def summary_table(
    scores: Mapping[str, Mapping[str, float]], seen: Sequence[str], unseen: Sequence[str]
) -> str:
    """Format scores as an aligned Markdown table: languages, their means, the worst.

    A language's share of right answers comes with its 95 % interval
    (`jaxmoo.evaluate.intervals.proportion`).

    Args:
      scores: per language its ``examples`` and scores by measure.
      seen: languages that were trained on.
      unseen: the others.

    Example:
      >>> print(summary_table({"en": {"examples": 8, "nll": 2.0}}, ["en"], []))
      | language  | examples |        NLL |
      |:----------|---------:|-----------:|
      | en        |        8 |      2.000 |
      | seen mean |        8 |      2.000 |
      | worst     |          | en   2.000 |
    """
    summary = summarise_measures(scores, seen, unseen)
    rows: list[list[object]] = []
    for language in (*seen, *unseen):
        label = language if language in seen else f"{language} (unseen)"
        values = [_shown(name, scores[language]) for name in summary]
        rows.append([label, scores[language]["examples"], *values])
    for group, languages in (("seen", seen), ("unseen", unseen)):
        if languages:
            examples = sum(int(scores[language]["examples"]) for language in languages)
            means = [f"{one[group]:.3f}" for one in summary.values()]
            rows.append([f"{group} mean", examples, *means])
    worst = [f"{one['worst_language']} {one['worst']:7.3f}" for one in summary.values()]
    rows.append(["worst", "", *worst])
    return text_table(["language", "examples", *(MEASURES[name].label for name in summary)], rows)


def _shown(name: str, scores: Mapping[str, float]) -> str:
    text = f"{scores[name]:.3f}"
    if not MEASURES[name].is_share:
        return text
    number = scores["examples"]
    low, high = proportion(scores[name] * number, number)
    return f"{text} [{low:.2f}, {high:.2f}]"
