"""Reading the examples of languages to the end of a source, or of several."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jaxmoo.config.data_section import DataConfig
from jaxmoo.data.example import Example
from jaxmoo.data.lengths import fits
from jaxmoo.data.sources.records import (
    Malformed,
    MissingLanguageError,
    Record,
    language_of,
    layout,
    take_examples,
)
from jaxmoo.data.sources.source import Source, missing_language, open_source
from jaxmoo.data.split import deduplicate
from jaxmoo.errors import ConfigError, DataError

__all__ = ["Loaded", "Reading", "load_examples", "read_examples"]


class Loaded(NamedTuple):
    """One language's examples.

    Attributes:
      examples: in the order of the source, duplicates included.
      skipped: number of malformed records left out.
      filtered: number of examples left out that are shorter or longer than asked.
    """

    examples: list[Example]
    skipped: int
    filtered: int = 0


class Reading(NamedTuple):
    """What a source holds.

    Attributes:
      languages: per language its examples.
      complaints: what is wrong with each record left out, with file and line; in a table of all
        languages also with those whose language cannot be told.
    """

    languages: dict[str, Loaded]
    complaints: list[str]


def load_examples(
    data: DataConfig,
    languages: Sequence[str],
    *,
    choices: str | None = None,
    source: Source | None = None,
) -> dict[str, list[Example]]:
    """Load each language's examples, without duplicates.

    `read_examples` takes the same arguments and describes them; this function then drops every
    example whose normalised prompt and reply occurred before in the language.

    Returns:
      Per language its distinct examples, in the order of the source.

    Raises:
      ConfigError: settings that contradict each other.
      DataError: the source, a language of it or a record cannot be used.
    """
    reading = read_examples(data, languages, choices=choices, source=source)
    return {language: deduplicate(found.examples) for language, found in reading.languages.items()}


def read_examples(
    data: DataConfig,
    languages: Sequence[str],
    *,
    choices: str | None = None,
    source: Source | None = None,
    whole: bool = True,
) -> Reading:
    """Read each language's examples to the end of the source.

    Args:
      data: the settings: the source, its columns and its names of languages.
      languages: the codes to read.
      choices: the column with a list of texts that the reply is chosen from; see `Example`.
      source: where the records come from, if not from ``data.source``.
      whole: whether one of several sources that has none of these languages is an error.

    Returns:
      Per language, in the order of `languages`, its examples, and what is wrong with the records
      left out. The known faults of the built-in corpus are left out in any case.

    Raises:
      ConfigError: settings that contradict each other.
      DataError: the source, a language of it or a record cannot be used.
    """
    if isinstance(languages, str) or not languages:
        raise ConfigError(f"Expected a list of language codes, found {languages!r}.")
    repeated = [language for language, count in Counter(languages).items() if count > 1]
    if repeated:
        raise ConfigError(f"Languages named more than once: {', '.join(repeated)}.")
    if source is not None or not data.sources:
        return _read(data, languages, choices, source)
    return _read_several(data.each, languages, choices, whole)


def _read_several(
    sources: Sequence[DataConfig], languages: Sequence[str], choices: str | None, whole: bool
) -> Reading:
    """Read several sources, each of which has one of the languages at least."""
    languages_read: dict[str, Loaded] = {}
    complaints: list[str] = []
    for number, data in enumerate(sources):
        reading = _read(data, languages, choices, None, partly=True, whole=whole)
        complaints += reading.complaints
        for language, found in reading.languages.items():
            before = languages_read.get(language, Loaded([], 0))
            examples = [dataclasses.replace(e, source=number) for e in found.examples]
            languages_read[language] = Loaded(
                before.examples + examples,
                before.skipped + found.skipped,
                before.filtered + found.filtered,
            )
    missing = [language for language in languages if language not in languages_read]
    if missing:
        names = ", ".join(repr(data.source) for data in sources)
        raise MissingLanguageError(f"None of the sources {names} has {', '.join(missing)}.")
    return Reading({language: languages_read[language] for language in languages}, complaints)


def _read(
    data: DataConfig,
    languages: Sequence[str],
    choices: str | None,
    source: Source | None,
    *,
    partly: bool = False,
    whole: bool = True,
) -> Reading:
    """Read one source, which may lack some of the languages if `partly`."""
    shape = layout(data, choices)
    where = str(data.source) if source is None else type(source).__name__
    source = open_source(data) if source is None else source
    stray = Malformed(where, data.max_malformed)
    streams: Mapping[str, Iterator[Record]]
    lacking: list[MissingLanguageError] = []
    if source.column is None:
        streams = {}
        for language in languages:
            try:
                streams[language] = source.open(language)
            except MissingLanguageError as error:
                if not partly:
                    raise
                lacking.append(error)
    else:
        names = {language: data.codes.get(language, language) for language in languages}
        sort = functools.partial(_sorted, column=source.column, where=where, stray=stray)
        streams = sort(source.open(languages[0]), names, lacking=lacking if partly else None)
    if lacking and not streams and whole:
        raise MissingLanguageError(
            f"{where} has none of the languages {', '.join(languages)}. {lacking[0]}"
        )
    complaints, loaded = list(stray.complaints), {}
    for language, records in streams.items():
        malformed = Malformed(f"language {language!r}", data.max_malformed)
        taken = take_examples(records, language, shape, malformed)
        malformed.check(len(taken.examples))
        kept = [example for example in taken.examples if fits(example, data.lengths)]
        if not kept:
            raise DataError(
                f"{where}: language {language!r} has no examples"
                + (f" within data.lengths, of {len(taken.examples)}" if taken.examples else "")
                + "."
            )
        skipped = len(malformed.complaints) + taken.known
        loaded[language] = Loaded(kept, skipped, len(taken.examples) - len(kept))
        complaints += malformed.complaints
    return Reading(loaded, complaints)


def _sorted(
    records: Iterable[Record],
    names: Mapping[str, str],
    column: str,
    where: str,
    stray: Malformed,
    lacking: list[MissingLanguageError] | None,
) -> dict[str, Iterator[Record]]:
    """Records of one table, sorted into languages by a column.

    `lacking` takes the errors of languages that it has none of; where it is None, one is raised.
    """
    table: dict[str, list[Record]] = {name: [] for name in names.values()}
    available = set()
    count = 0
    for record in records:
        try:
            name = language_of(record, column)
        except DataError as error:
            stray.add(error)
            continue
        available.add(name)
        count += 1
        if name in table:
            table[name].append(record)
    stray.check(count)
    for name, found in table.items():
        if not found:
            error = missing_language(where, name, available)
            if lacking is None:
                raise error
            lacking.append(error)
    return {language: iter(table[name]) for language, name in names.items() if table[name]}
