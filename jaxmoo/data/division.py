"""What the settings make of a source: per language what is trained on and what is evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxmoo.config.data_section import DataConfig
from jaxmoo.data.example import Example
from jaxmoo.data.sources.reading import Loaded, read_examples
from jaxmoo.data.sources.source import Source
from jaxmoo.data.split import (
    Share,
    Split,
    alone,
    deduplicate,
    split_languages,
    with_own_held_out,
    with_unevaluated,
)

__all__ = ["DividedLanguage", "divide"]


class DividedLanguage(NamedTuple):
    """One language's examples, divided.

    Attributes:
      train: to train on; of an unseen language empty.
      held_out: to evaluate, no more than asked.
      records: examples read, duplicates included.
      skipped: malformed records left out.
      filtered: examples left out for their length in characters.
      duplicates: examples left out because they had occurred before.
      leaked: held-out examples left out because they are among what is trained on.
      reserve: examples held out beyond what is evaluated, and used for nothing.
    """

    train: list[Example]
    held_out: list[Example]
    records: int
    skipped: int
    filtered: int
    duplicates: int
    leaked: int
    reserve: int


def divide(
    data: DataConfig,
    languages: Sequence[str],
    complaints: list[str],
    *,
    choices: str | None = None,
    source: Source | None = None,
    share: Share = alone,
) -> dict[str, DividedLanguage]:
    """Read languages whole and divide their examples.

    Args:
      data: the settings; what is held out of one language depends on what is trained on in all
        those that are read.
      languages: their codes.
      complaints: takes what is wrong with each record left out.
      choices: the column of texts that a reply is chosen from; see `Example`.
      source: where the records come from, if not from ``data.source``.
      share: given digests of what these languages have, returns those of what all languages of the
        run have, where other processes read the rest.

    Returns:
      Per language what became of its records.

    Raises:
      ConfigError, DataError: the data cannot be used as asked.
    """
    own, seen = data.own_held_out, [code for code in languages if code in data.seen]
    readings = []
    whole = set(languages) >= {*data.seen, *data.unseen}
    if own is None or seen:
        wanted = languages if own is None else seen
        readings.append(read_examples(data, wanted, choices=choices, source=source, whole=whole))
    if own is not None:
        readings.append(read_examples(own, languages, choices=choices, whole=whole))
    complaints += [text for reading in readings for text in reading.complaints]
    distinct = [
        {code: deduplicate(found.examples) for code, found in reading.languages.items()}
        for reading in readings
    ]
    if own is None:
        linked = data.disjoint_replies
        split = split_languages(
            distinct[0], data.seen, data.held_out, disjoint_replies=linked, share=share
        )
    else:
        split = with_own_held_out(distinct[0] if seen else {}, distinct[-1], share=share)
    evaluated = {code: one.held_out[: data.max_held_out] for code, one in split.items()}
    if data.train_unevaluated:
        split = with_unevaluated(
            split, evaluated, data.seen, disjoint_replies=data.disjoint_replies, share=share
        )

    def described(code: str, one: Split) -> DividedLanguage:
        parts = [reading.languages.get(code, Loaded([], 0)) for reading in readings]
        read = sum(len(part.examples) for part in parts)
        return DividedLanguage(
            train=one.train,
            held_out=evaluated[code],
            records=read,
            skipped=sum(part.skipped for part in parts),
            filtered=sum(part.filtered for part in parts),
            duplicates=read - sum(len(part.get(code, ())) for part in distinct),
            leaked=one.leaked,
            reserve=len(one.held_out) - len(evaluated[code]),
        )

    return {code: described(code, split[code]) for code in languages}
