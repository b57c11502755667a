"""Where examples come from: the built-in corpus, local files or a hub dataset."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxmoo.data.chatterbot import read_chatterbot
from jaxmoo.data.example import Example, listed
from jaxmoo.data.files import KINDS, READERS, Record, kind_of, read_records
from jaxmoo.data.languages import nearest_language
from jaxmoo.data.malformed import Malformed
from jaxmoo.data.records import check_columns, language_of, to_example
from jaxmoo.data.split import deduplicate
from jaxmoo.errors import ConfigError, DataError, did_you_mean
from jaxmoo.files.outputs import typed_path

BUILT_IN = "chatterbot"


class Loaded(NamedTuple):
    """One language's examples.

    Attributes:
      examples: in the order of the source, duplicates included.
      skipped: number of malformed records left out.
    """

    examples: list[Example]
    skipped: int


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
    source: str,
    languages: Sequence[str],
    *,
    columns: Mapping[str, str | None] | None = None,
    codes: Mapping[str, str] | None = None,
    language_column: str | None = None,
    subset: str | None = None,
    split: str = "train",
    max_malformed: float = 0.0,
    cache_dir: Path | None = None,
) -> dict[str, list[Example]]:
    """Load each language's examples, without duplicates.

    `read_examples` takes the same arguments and describes them; this function then drops every
    example whose normalised prompt and reply occurred before in the language.

    Returns:
      Per language its distinct examples, in the order of the source.

    Raises:
      ConfigError: arguments that contradict each other.
      DataError: the source, a language of it or a record cannot be used.
    """
    loaded = read_examples(
        source,
        languages,
        columns=columns,
        codes=codes,
        language_column=language_column,
        subset=subset,
        split=split,
        max_malformed=max_malformed,
        cache_dir=cache_dir,
    )
    return {language: deduplicate(found.examples) for language, found in loaded.languages.items()}


def read_examples(
    source: str,
    languages: Sequence[str],
    *,
    columns: Mapping[str, str | None] | None = None,
    codes: Mapping[str, str] | None = None,
    language_column: str | None = None,
    subset: str | None = None,
    split: str = "train",
    max_malformed: float = 0.0,
    cache_dir: Path | None = None,
) -> Reading:
    """Read each language's examples as the source holds them.

    Args:
      source: one of

        - ``"chatterbot"``, the built-in corpus;
        - a path with ``{language}`` in it, such as ``"data/{language}.jsonl"`` (also ``.json``,
          ``.parquet``, ``.csv``, and those of text compressed, ``.jsonl.gz``, ``.csv.zst``);
        - a directory of files named by language, such as ``en.jsonl``;
        - one such file of all languages, told apart by `language_column`;
        - the id of a hub dataset, ``"owner/name"``.
      languages: the codes to load.
      columns: which column of a record holds what. Keys: ``prompt`` and ``completion``, or
        ``messages`` (a list of ``{"role", "content"}``), or ``text``; and ``group`` and ``choices``
        (a list of texts; see `Example`). By default ``messages`` where a record has it, else
        ``prompt`` and ``completion``, else ``text``.
      codes: the source's own names of languages, ``{"pt": "por_Latn"}``; the code itself where
        absent.
      language_column: the column that names a record's language.
      subset: a hub dataset's subset (configuration); ``{language}`` stands for the language.
        Default: the one named as the language is, unless `language_column` or `split` tell
        languages apart.
      split: a hub dataset's split; ``{language}`` stands for the language.
      max_malformed: the largest share of a language's records that may be malformed; they are
        left out. By default the first one is an error.
      cache_dir: where the built-in corpus is kept.

    Returns:
      Per language, in the order of `languages`, its examples, and what is wrong with the records
      left out. The known faults of the built-in corpus are left out in any case.

    Raises:
      ConfigError: arguments that contradict each other.
      DataError: the source, a language of it or a record cannot be used.
    """
    languages = _check_languages(languages)
    columns = check_columns(columns)
    names = {language: (codes or {}).get(language, language) for language in languages}
    path = typed_path(source)
    complaints: list[str] = []

    if source == BUILT_IN:
        loaded = {
            language: Loaded(*found)
            for language, found in read_chatterbot(languages, cache_dir=cache_dir).items()
        }
    else:
        if "{language}" in source or path.is_dir():
            files = language_files(source, names)
            records = {language: read_records(file) for language, file in files.items()}
        else:
            stray = Malformed(source, max_malformed)
            if path.is_file():
                column = check_one_file(path, language_column)
                records = _by_column(path, read_records(path), names, column, stray)
            else:
                records = hub_records(
                    check_hub_id(source), names, subset, split, language_column, stray
                )
            complaints += stray.complaints
        loaded = {}
        for language, found in records.items():
            malformed = Malformed(f"language {language!r}", max_malformed)
            examples = []
            for record in found:
                try:
                    examples.append(to_example(record, language, columns))
                except DataError as error:
                    malformed.add(error)
            malformed.check(len(examples))
            loaded[language] = Loaded(examples, len(malformed.complaints))
            complaints += malformed.complaints
    for language, found in loaded.items():
        if not found.examples:
            raise DataError(f"{source}: language {language!r} has no examples.")
    return Reading(loaded, complaints)


def _check_languages(languages: Sequence[str]) -> list[str]:
    if isinstance(languages, str) or not languages:
        raise ConfigError(f"Expected a list of language codes, found {languages!r}.")
    repeated = [language for language, count in Counter(languages).items() if count > 1]
    if repeated:
        raise ConfigError(f"Languages named more than once: {', '.join(repeated)}.")
    return list(languages)


def check_hub_id(source: str, *, streaming: bool = False) -> str:
    """Return the id of a hub dataset.

    Args:
      source: the id.
      streaming: whether it is to be streamed, as the built-in corpus cannot be.

    Raises:
      DataError: it is no such id, and nothing else either.
    """
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and kind_of(Path(source)) not in READERS:
        return source
    if "/" in source or kind_of(Path(source)) in READERS:
        raise DataError(f"No file or directory {source!r}.")
    built_in = [] if streaming else [BUILT_IN]
    raise DataError(
        f"Unknown data source {source!r}.{did_you_mean(source, built_in)} Expected "
        f"{''.join(f'{name!r}, ' for name in built_in)}a path such as 'data/{{language}}.jsonl', a "
        "directory, or a hub dataset 'owner/name'."
    )


def _missing_language(source: str | Path, name: str, available: Iterable[str]) -> DataError:
    available = sorted(available)
    return DataError(
        f"{source} has no language {name!r}. Available: {listed(available) or 'none'}."
        f"{nearest_language(name, available)}"
    )


def language_files(
    source: str, names: Mapping[str, str], kinds: Sequence[str] = KINDS
) -> dict[str, Path]:
    """Find one file per language.

    Args:
      source: a path with ``{language}`` in it, or a directory of files named by language.
      names: per language the source's name of it.
      kinds: what files can be, for the error.

    Returns:
      Per language its file.

    Raises:
      DataError: a language has none, or several.
    """
    path = typed_path(source)
    found: dict[str, list[Path]] = {}
    if path.is_dir() and "{language}" not in source:
        for file in sorted(path.iterdir()):
            if (kind := kind_of(file)) in READERS:
                found.setdefault(file.name[: -len(kind)], []).append(file)
    else:
        if kind_of(path) not in READERS:
            raise DataError(_unknown_kind(source, path, kinds))
        # The name between the braces may occur several times, "data/{language}/{language}.csv".
        first, *rest = re.escape(str(path)).split(re.escape("{language}"))
        pattern = re.compile(first + "([^/\\\\]+)" + "\\1".join(rest))
        wildcard = "*".join(glob.escape(part) for part in str(path).split("{language}"))
        for file in sorted(glob.glob(wildcard)):
            if match := pattern.fullmatch(file):
                found.setdefault(match[1], []).append(Path(file))
    for name in names.values():
        if name not in found:
            raise _missing_language(source, name, found)
        if len(found[name]) > 1:
            raise DataError(
                f"{source}: several files for language {name!r}: "
                f"{', '.join(file.name for file in found[name])}. Keep one, or give a pattern "
                "such as 'data/{language}.jsonl'."
            )
    return {language: found[name][0] for language, name in names.items()}


def _by_column(
    source: str | Path,
    records: Iterable[Record],
    names: Mapping[str, str],
    column: str,
    stray: Malformed,
) -> dict[str, list[Record]]:
    """Records of one table, sorted into languages by a column."""
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
            raise _missing_language(source, name, available)
    return {language: table[name] for language, name in names.items()}


def _unknown_kind(source: str | Path, path: Path, kinds: Sequence[str]) -> str:
    return (
        f"{source}: expected a file name ending in {', '.join(kinds)}, found "
        f"{path.suffix or 'no suffix'!r}. Files of text may also be compressed (.gz, .zst)."
    )


def check_one_file(path: Path, language_column: str | None, kinds: Sequence[str] = KINDS) -> str:
    """Return the column that tells apart the languages of one file.

    Args:
      path: the file.
      language_column: as in `read_examples`.
      kinds: what it can be, for the error.

    Raises:
      DataError: the file is of no known kind.
      ConfigError: no column is named.
    """
    if kind_of(path) not in READERS:
        raise DataError(_unknown_kind(path, path, kinds))
    if language_column is None:
        raise ConfigError(
            f"{path} is one file: say which column names the language (language_column), or give "
            "one file per language, 'data/{language}.jsonl'."
        )
    return language_column


def hub_records(
    dataset: str,
    names: Mapping[str, str],
    subset: str | None,
    split: str,
    language_column: str | None,
    stray: Malformed,
) -> dict[str, Iterable[Record]]:
    """Read a hub dataset whose languages are subsets, splits or values of a column.

    Args:
      dataset: its id, or a directory laid out as a hub dataset.
      names: per language the dataset's name of it.
      subset: as in `read_examples`, and so are `split` and `language_column`.
      split: the split.
      language_column: the column of the language.
      stray: notes records without that column.

    Returns:
      Per language its records.

    Raises:
      DataError: the dataset cannot be loaded, or has no such language.
    """

    def rows(subset: str | None, split: str) -> Iterator[Record]:
        for number, values in enumerate(load_hub(dataset, subset, split), start=1):
            yield f"{dataset} ({subset or 'default'}, {split}): row {number}", values

    if language_column is not None:
        return _by_column(dataset, rows(subset, split), names, language_column, stray)
    return {
        language: rows(*part) for language, part in hub_parts(dataset, names, subset, split).items()
    }


def hub_parts(
    dataset: str, names: Mapping[str, str], subset: str | None, split: str
) -> dict[str, tuple[str | None, str]]:
    """Return the subset and split of every language of a hub dataset.

    Args:
      dataset: as in `hub_records`, and so are the others.

    Raises:
      DataError: the dataset cannot be read, or has no such language.
    """
    import datasets

    if subset is None and "{language}" not in split:
        subset = "{language}"
    if subset is not None and "{language}" in subset:
        available = _call_hub(dataset, datasets.get_dataset_config_names, dataset)
        for name in names.values():
            if subset.replace("{language}", name) not in available:
                raise DataError(
                    f"{_missing_language(dataset, name, available)} If its languages are told "
                    "apart by a column, name it in language_column."
                )
    return {
        language: (
            subset and subset.replace("{language}", name),
            split.replace("{language}", name),
        )
        for language, name in names.items()
    }


def load_hub(dataset: str, subset: str | None, split: str, *, streaming: bool = False) -> Any:
    """Open a hub dataset, or one laid out like it.

    Raises:
      DataError: it cannot be loaded.
    """
    import datasets

    options = {"split": split, "streaming": streaming}
    return _call_hub(dataset, datasets.load_dataset, dataset, subset, **options)


def _call_hub(dataset: str, function: Any, *arguments: Any, **options: Any) -> Any:
    import datasets

    try:
        return function(*arguments, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"Cannot load {dataset!r} from the Hugging Face hub ({error}). Expected a hub "
            "dataset id, or local files such as 'data/{language}.jsonl'."
        ) from error
