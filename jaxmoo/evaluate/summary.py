"""Scores of many languages in few numbers: means over seen and unseen ones, the worst one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxmoo.data.table import text_table
from jaxmoo.errors import ConfigError, did_you_mean
from jaxmoo.runs.scores import LanguageScore


@dataclass(frozen=True)
class Summary:
    """Means over languages, each language counting once, and the worst language.

    Attributes:
      seen_nll, seen_bits_per_byte: means over the seen languages.
      unseen_nll, unseen_bits_per_byte: means over the unseen languages; None without any.
      worst, worst_nll: the language of the highest NLL among all, and its NLL.
      worst_by_bytes, worst_bits_per_byte: the same by bits per byte.
    """

    seen_nll: float
    seen_bits_per_byte: float
    unseen_nll: float | None
    unseen_bits_per_byte: float | None
    worst: str
    worst_nll: float
    worst_by_bytes: str
    worst_bits_per_byte: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return asdict(self)


def summarise(
    scores: Mapping[str, LanguageScore], seen: Sequence[str], unseen: Sequence[str] = ()
) -> Summary:
    """Summarise scores over languages.

    Args:
      scores: per language its score.
      seen: the languages that were trained on, at least one.
      unseen: the languages that were not.

    Returns:
      The means and the worst language. A language whose NLL is not a number is the worst.

    Raises:
      ConfigError: a language has no score, or no language is seen.

    Example:
      >>> scores = {"en": LanguageScore(1.0, 0.5, 9, 9, 1), "fa": LanguageScore(3.0, 0.7, 9, 9, 1)}
      >>> summary = summarise(scores, ["en", "fa"])
      >>> summary.seen_nll, summary.worst
      (2.0, 'fa')
    """
    if not seen:
        raise ConfigError("A summary needs at least one seen language.")
    for language in (*seen, *unseen):
        if language not in scores:
            raise ConfigError(f"No score of {language!r}.{did_you_mean(language, scores)}")

    def mean(languages: Sequence[str], field: str) -> float:
        values = [getattr(scores[language], field) for language in languages]
        return sum(values) / len(values)

    def worst(field: str) -> tuple[str, float]:
        # Not-a-number is not equal to itself, and sorts above every number here.
        values = {language: getattr(scores[language], field) for language in (*seen, *unseen)}
        language = max(values, key=lambda name: (values[name] != values[name], values[name]))
        return language, values[language]

    return Summary(
        mean(seen, "nll"),
        mean(seen, "bits_per_byte"),
        mean(unseen, "nll") if unseen else None,
        mean(unseen, "bits_per_byte") if unseen else None,
        *worst("nll"),
        *worst("bits_per_byte"),
    )


def before_after_table(
    before: Mapping[str, LanguageScore],
    after: Mapping[str, LanguageScore],
    seen: Sequence[str],
    unseen: Sequence[str] = (),
) -> str:
    """Format the scores before and after training as an aligned Markdown table.

    Args:
      before: per language its score before training.
      after: the same after it, on the same examples.
      seen: the languages that were trained on.
      unseen: the languages that were not.

    Returns:
      One row per language, then the seen mean, the unseen mean and the worst language by either
      measure (which may be another after than before).

    Raises:
      ConfigError: a language has no score.

    Example:
      >>> before, after = LanguageScore(2.0, 1.0, 9, 9, 1), LanguageScore(1.5, 0.75, 9, 9, 1)
      >>> print(before_after_table({"en": before}, {"en": after}, ["en"]))
      | language            | NLL before → after | change |     bits/byte | change | replies |
      |:--------------------|-------------------:|-------:|--------------:|-------:|--------:|
      | en                  |      2.000 → 1.500 | -0.500 | 1.000 → 0.750 | -0.250 |       1 |
      | seen mean           |      2.000 → 1.500 | -0.500 | 1.000 → 0.750 | -0.250 |       1 |
      | worst NLL: en       |      2.000 → 1.500 | -0.500 |               |        |         |
      | worst bits/byte: en |                    |        | 1.000 → 0.750 | -0.250 |         |
    """
    first, last = summarise(before, seen, unseen), summarise(after, seen, unseen)

    def cells(old: float, new: float) -> list[str]:
        return [f"{old:.3f} → {new:.3f}", f"{new - old:+.3f}"]

    rows = []
    for language in (*seen, *unseen):
        old, new = before[language], after[language]
        rows.append(
            [
                language if language in seen else f"{language} (unseen)",
                *cells(old.nll, new.nll),
                *cells(old.bits_per_byte, new.bits_per_byte),
                new.examples,
            ]
        )
    for name, languages in (("seen", seen), ("unseen", unseen)):
        if languages:
            rows.append(
                [
                    f"{name} mean",
                    *cells(getattr(first, f"{name}_nll"), getattr(last, f"{name}_nll")),
                    *cells(
                        getattr(first, f"{name}_bits_per_byte"),
                        getattr(last, f"{name}_bits_per_byte"),
                    ),
                    sum(after[language].examples for language in languages),
                ]
            )
    for name, old, new, old_value, new_value in (
        ("NLL", first.worst, last.worst, first.worst_nll, last.worst_nll),
        (
            "bits/byte",
            first.worst_by_bytes,
            last.worst_by_bytes,
            first.worst_bits_per_byte,
            last.worst_bits_per_byte,
        ),
    ):
        label = old if old == new else f"{old} → {new}"
        found, none = cells(old_value, new_value), ["", ""]
        pair = found + none if name == "NLL" else none + found
        rows.append([f"worst {name}: {label}", *pair, ""])
    header = ["language", "NLL before → after", "change"]
    return text_table([*header, "bits/byte", "change", "replies"], rows)
