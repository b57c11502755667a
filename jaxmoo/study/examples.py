"""Scores of single held-out examples, kept in the rows: what intervals over examples need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoo.data.split import hash_fraction
from jaxmoo.errors import DataError
from jaxmoo.evaluate.measures import MEASURES, measured
from jaxmoo.evaluate.results import LanguageResult

__all__ = ["PARTS", "members", "pack_examples", "reported_part", "unpack_examples"]

# Of a language's held-out examples: those by which learning rates are chosen, the others, and both.
PARTS = ("tune", "report", "all")
_DIGITS = 3  # of a likelihood in nats: far below what a run's other choices change
_SHARED = {measure.denominator for measure in MEASURES.values() if measure.denominator}


def reported_part(learning_rates: Sequence[float]) -> str:
    """Return which part of the held-out examples is reported: all, if nothing is chosen."""
    return "report" if len(learning_rates) > 1 else "all"


def members(units: Sequence[str], part: str, tune: float) -> list[int]:
    """Return which examples of a language belong to a part.

    Args:
      units: per example what it is drawn with. It decides the part, so that translations of one
        text are on the same side in all languages.
      part: one of `PARTS`.
      tune: share of the examples by which learning rates are chosen.

    Returns:
      Positions of the examples, ascending.

    Example:
      >>> members(["a", "b", "c"], "tune", 0.5), members(["a", "b", "c"], "report", 0.5)
      ([2], [0, 1])
    """
    chosen = [hash_fraction(f"study:{unit}") < tune for unit in units]
    return [i for i, one in enumerate(chosen) if part == "all" or one == (part == "tune")]


def pack_examples(
    results: Mapping[str, LanguageResult], part: str, tune: float, *, base: bool
) -> dict[str, Any]:
    """Return what a row keeps of single examples, as its value of ``examples``.

    Args:
      results: per language what was found.
      part: which examples, of `PARTS`; see `reported_part`.
      tune: as `members` takes it.
      base: for the row of the model before training, which also keeps what is the same in all
        rows: units, tokens and bytes.

    Returns:
      Per language its columns: likelihoods in nats, rounded to 0.001, and answers that are right or
      wrong as a text of 1 and 0. What generation would add is left out.

    Example:
      >>> columns = {"nats": [1.23456, 2.0], "tokens": [3, 4], "bytes": [9, 8], "correct": [1, 0]}
      >>> result = LanguageResult("digest", ["a", "b"], columns, {})
      >>> pack_examples({"en": result}, "all", 0.5, base=False)
      {'part': 'all', 'languages': {'en': {'nats': [1.235, 2.0], 'correct': '10'}}}
    """
    languages = {}
    for code, result in results.items():
        kept = members(result.units, part, tune)
        names = dict.fromkeys(MEASURES[name].numerator for name in measured(result.columns))
        found: dict[str, Any] = {}
        for name in names:
            values = [result.columns[name][i] for i in kept]
            if set(values) <= {0, 1}:
                found[name] = "".join(str(int(value)) for value in values)
            else:
                found[name] = [round(float(value), _DIGITS) for value in values]
        if base:
            found["units"] = [result.units[i] for i in kept]
            for name in sorted(_SHARED):
                found[name] = [result.columns[name][i] for i in kept]
        languages[code] = found
    return {"part": part, "languages": languages}


def unpack_examples(
    row: Mapping[str, Any], base: Mapping[str, Any] | None, part: str
) -> dict[str, LanguageResult] | None:
    """Return the single examples of a row.

    Args:
      row: the row.
      base: the row of the model before training, which has units, tokens and bytes.
      part: which examples are wanted.

    Returns:
      Per language its examples; None where the rows hold none of this part, as older ones do.

    Raises:
      DataError: the examples are not those of the row's scores.
    """
    own, shared = row.get("examples"), (base or {}).get("examples")
    if not own or not shared or own["part"] != part or shared["part"] != part:
        return None
    found = {}
    for code, scores in row["languages"].items():
        like = shared["languages"].get(code)
        if like is None or code not in own["languages"]:
            raise DataError(f"The rows hold no single examples of {code!r}, but of others.")
        columns = {name: list(map(int, like[name])) for name in _SHARED}
        for name, values in own["languages"][code].items():
            if name != "units":
                columns[name] = list(map(int, values)) if isinstance(values, str) else values
        result = LanguageResult(row["data"][code], like["units"], columns, {})
        lengths = {len(column) for column in (like["units"], *columns.values())}
        if lengths != {scores[part]["examples"]}:
            raise DataError(
                f"A row's score of {code!r} is of {scores[part]['examples']} examples, but single "
                f"ones are stored of {', '.join(map(str, sorted(lengths)))}."
            )
        nll = result.scores()["nll"]
        if not np.isclose(nll, scores[part]["nll"], rtol=1e-3, atol=2 * 10**-_DIGITS):
            raise DataError(
                f"A row's NLL of {code!r} is {scores[part]['nll']:.4f}, but that of its single "
                f"examples {nll:.4f}."
            )
        found[code] = result
    return found
