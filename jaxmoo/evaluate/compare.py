"""Two evaluations of the same examples, side by side, with intervals of their differences.

Examples are drawn again with replacement, the same ones for both (paired bootstrap, percentile
intervals). Parallel examples, which name the group they belong to, are drawn together in all
languages that have the same groups: a sentence that is hard in one language tends to be hard in
all, and means over languages would otherwise seem more certain than they are.

Efron & Tibshirani, *An Introduction to the Bootstrap*, 1993; Koehn, *Statistical Significance Tests
for Machine Translation Evaluation*, 2004.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np

from jaxmoo.data.table import text_table
from jaxmoo.errors import DataError
from jaxmoo.evaluate.measures import MEASURES, measured
from jaxmoo.evaluate.results import LanguageResult, Results

__all__ = ["Comparison", "Row", "compare"]


class Row(NamedTuple):
    """One measure of one language, or of a mean over languages.

    Attributes:
      a: score of the first evaluation.
      b: score of the second.
      difference: b - a.
      low: lower end of the difference's 95 % interval; not a number with fewer than two units.
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
      resamples: how often examples are drawn.
      seed: of the draws.

    Returns:
      Scores, differences and intervals.

    Raises:
      DataError: the two are of different languages or examples, or share no measure.
    """
    _check_same(a, b)
    seen = [code for code in a.languages if code in a.seen]
    unseen = [code for code in a.languages if code not in seen]
    drawn: dict[tuple[str, ...], np.ndarray] = {}
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
        samples = {
            code: _sampled(name, pair, drawn, resamples, seed) for code, pair in pairs.items()
        }
        rows[name] = {code: _row(one) for code, one in samples.items()}
        for label, codes in (("seen mean", seen), ("unseen mean", unseen)):
            if codes:
                rows[name][label] = _row(np.mean([samples[code] for code in codes], axis=0))
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


def _sampled(
    name: str,
    pair: tuple[LanguageResult, LanguageResult],
    drawn: dict[tuple[str, ...], np.ndarray],
    resamples: int,
    seed: int,
) -> np.ndarray:
    """Scores [2, 1 + R] of both: first as they are, then of every resample."""
    measure, first = MEASURES[name], pair[0]
    units = tuple(sorted(set(first.units)))
    if units not in drawn:
        # The same units are drawn alike, whatever else is compared; others independently.
        named = hashlib.sha256("\x1e".join(units).encode()).digest()
        rng = np.random.default_rng([seed, int.from_bytes(named[:8], "big")])
        counts = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), resamples)
        drawn[units] = np.vstack([np.ones(len(units)), counts])
    number = {unit: i for i, unit in enumerate(units)}
    weights = drawn[units][:, [number[unit] for unit in first.units]]
    below = np.ones(len(first.units))
    if measure.denominator is not None:
        below = np.asarray(first.columns[measure.denominator], np.float64)
    above = np.array([one.columns[measure.numerator] for one in pair], np.float64)
    samples = measure.scale * (above @ weights.T) / (weights @ below)
    if len(units) < 2:
        samples[:, 1:] = np.nan
    return samples


def _row(samples: np.ndarray) -> Row:
    (a, *_), (b, *_) = samples
    differences = samples[1, 1:] - samples[0, 1:]
    low, high = np.percentile(differences, [2.5, 97.5])
    return Row(*map(float, (a, b, b - a, low, high)))


def _interval(row: Row) -> str:
    return "-" if np.isnan(row.low) else f"[{row.low:+.3f}, {row.high:+.3f}]"
