"""Two evaluations of the same examples, side by side, with intervals of their differences.

Parallel examples, which name the group they belong to, count together in all languages that have
them: a sentence that is hard in one language tends to be hard in all, and means over languages
would otherwise seem more certain than they are. `jaxmoo.evaluate.intervals` has the intervals.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxmoo.data.table import text_table
from jaxmoo.errors import DataError
from jaxmoo.evaluate.intervals import (
    SMALLEST,
    Differences,
    mean_proportion_difference,
    studentised_mean,
)
from jaxmoo.evaluate.measures import MEASURES, measured, quotient, score
from jaxmoo.evaluate.results import LanguageResult, Results

__all__ = ["Comparison", "Row", "compare"]


class Row(NamedTuple):
    """One measure of one language, or of a mean over languages.

    Attributes:
      a: score of the first evaluation.
      b: score of the second.
      difference: b - a.
      low: lower end of the difference's 95 % interval; not a number where there is none.
      high: its upper end.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float


class Comparison(NamedTuple):
    """What `compare` found.

    Attributes:
      rows: per measure and language; ``seen mean`` and ``unseen mean`` beside the languages.
      notes: what a reader should know.
    """

    rows: dict[str, dict[str, Row]]
    notes: list[str]

    def table(self) -> str:
        """Format the rows as one aligned table per measure."""
        parts = []
        for name, rows in self.rows.items():
            better = "higher" if MEASURES[name].higher_is_better else "lower"
            header = [f"{MEASURES[name].label} ({better} is better)", "A", "B", "B - A", "95 %"]
            cells = [
                [label, f"{r.a:.3f}", f"{r.b:.3f}", f"{r.difference:+.3f}", _interval(r)]
                for label, r in rows.items()
            ]
            parts.append(text_table(header, cells))
        return "\n\n".join([*parts, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Return the rows as a dictionary that JSON can hold."""
        return {
            name: {label: row._asdict() for label, row in rows.items()}
            for name, rows in self.rows.items()
        }


def compare(a: Results, b: Results, *, resamples: int = 2000, seed: int = 0) -> Comparison:
    """Compare two evaluations of the same examples.

    Args:
      a: the first.
      b: the second; differences are b - a.
      resamples: how often examples are drawn, for measures that are no share of examples.
      seed: of the draws.

    Returns:
      Scores, differences and intervals.

    Raises:
      DataError: the two are of different languages or examples, or share no measure.
    """
    _check_same(a, b)
    seen = [code for code in a.languages if code in a.seen]
    unseen = [code for code in a.languages if code not in seen]
    rows: dict[str, dict[str, Row]] = {}
    notes = []
    if a.date != b.date:
        notes.append(
            f"The chat templates saw different dates, A {a.date or 'none'} and B "
            f"{b.date or 'none'}: prompts differ by more than the models. Evaluate both with the "
            "same --date."
        )
    for name in MEASURES:
        pairs = {code: (one, b.languages[code]) for code, one in a.languages.items()}
        if not all(name in measured(r.columns) for pair in pairs.values() for r in pair):
            continue
        if not all(_same_denominator(name, *pair) for pair in pairs.values()):
            notes.append(
                f"{MEASURES[name].label} is left out: the models cut the replies into different "
                f"{MEASURES[name].denominator}."
            )
            continue
        groups = {code: [code] for code in pairs} | {"seen mean": seen, "unseen mean": unseen}
        rows[name] = {
            label: _row(name, [pairs[code] for code in codes], resamples, seed)
            for label, codes in groups.items()
            if codes
        }
    if any(np.isnan(row.low) for found in rows.values() for row in found.values()):
        notes.append(
            f"No interval (-): fewer than {SMALLEST} examples that are drawn independently, with "
            "which intervals would cover too little."
        )
    if not rows:
        raise DataError(f"{a.path} and {b.path} have no measure in common.")
    return Comparison(rows, notes)


def _check_same(a: Results, b: Results) -> None:
    for one, other in ((a, b), (b, a)):
        lacking = [code for code in one.languages if code not in other.languages]
        if lacking:
            raise DataError(
                f"{other.path} has no results of {', '.join(lacking)}, which {one.path} has. "
                "Evaluate both models on the same languages."
            )
    different = [c for c, result in a.languages.items() if result.data != b.languages[c].data]
    if different:
        raise DataError(
            f"{a.path} and {b.path} are of different examples in {', '.join(different)}. Only "
            "results of the same data can be compared: evaluate both models with the same --data, "
            "--config, --max-examples and --choices."
        )
    for code, result in a.languages.items():
        if result.columns["bytes"] != b.languages[code].columns["bytes"]:
            raise DataError(
                f"{a.path} and {b.path} scored different parts of the replies in {code}, because "
                "some were cut. Evaluate both models with a --max-length that cuts none."
            )


def _same_denominator(name: str, a: LanguageResult, b: LanguageResult) -> bool:
    column = MEASURES[name].denominator
    return column is None or a.columns[column] == b.columns[column]


def _apart(name: str, pair: tuple[LanguageResult, LanguageResult]) -> Differences:
    """What the two differ by on every example."""
    (a, below), (b, _) = (quotient(one.columns, name) for one in pair)
    return Differences(MEASURES[name].scale * (b - a), below, pair[0].units)


def _row(
    name: str, pairs: list[tuple[LanguageResult, LanguageResult]], resamples: int, seed: int
) -> Row:
    a, b = (float(np.mean([score(pair[i].columns, name) for pair in pairs])) for i in (0, 1))
    apart = [_apart(name, pair) for pair in pairs]
    if min(len(set(one.units)) for one in apart) < SMALLEST:
        low = high = float("nan")
    elif MEASURES[name].is_share:
        low, high = mean_proportion_difference(apart)
    else:
        low, high = studentised_mean(apart, resamples=resamples, seed=seed)
    return Row(a, b, b - a, low, high)


def _interval(row: Row) -> str:
    return "-" if np.isnan(row.low) else f"[{row.low:+.3f}, {row.high:+.3f}]"
