"""Where records come from: the built-in corpus, files, a hub data set, or one's own `Source`."""

from __future__ import annotations

import functools
import glob
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxmoo.config.data_section import DataConfig
from jaxmoo.data.example import listed
from jaxmoo.data.sources.chatterbot import BUILT_IN, Chatterbot
from jaxmoo.data.sources.files import KINDS, STREAMED, is_damage, is_data, kind_of, open_file
from jaxmoo.data.sources.own import OwnSource, origin_of
from jaxmoo.data.sources.records import (
    MissingLanguageError,
    Origin,
    Record,
    RecordStream,
    SequenceStream,
)
from jaxmoo.errors import ConfigError, DataError, did_you_mean
from jaxmoo.files.buckets import is_bucket
from jaxmoo.files.outputs import typed_path
from jaxmoo.registry import is_path

__all__ = [
    "FilesSource",
    "HubSource",
    "Source",
    "TableSource",
    "missing_language",
    "open_source",
    "origins_of",
]


class Source(Protocol):
    """Opens the records of every language.

    One that also has a method ``origin(language)``, which returns an `Origin` (or None), has its
    tokens kept (``data.cache``) under a digest of that and of the file in which it is defined.

    Attributes:
      column: the column that names a record's language, where every stream has the records of all
        languages; None where a stream has those of its own language alone.
    """

    column: str | None

    def open(self, language: str) -> RecordStream:
        """Return a new stream of a language's records, at the beginning.

        Args:
          language: the run's code of the language.

        Raises:
          DataError: there is no such language, or it cannot be read.
        """
        ...


class FilesSource:
    """One file per language.

    Args:
      source: a path with ``{language}`` in it, such as ``"data/{language}.jsonl"``, or a directory
        of files named by language.
      data: the settings.
    """

    column: str | None = None

    def __init__(self, source: str, data: DataConfig) -> None:
        self._source, self._data = source, data
        self._files = _language_files(source, STREAMED if data.streaming else KINDS)

    def open(self, language: str) -> RecordStream:
        """Return a new stream of a language's records."""
        return _opened(self._file(language), self._data)

    def origin(self, language: str) -> Origin:
        """Return what decides a language's records."""
        return Origin((self._file(language),))

    def _file(self, language: str) -> Path:
        name = self._data.codes.get(language, language)
        files = self._files.get(name)
        if not files:
            raise missing_language(self._source, name, self._files)
        if len(files) > 1:
            raise DataError(
                f"{self._source}: several files for language {name!r}: "
                f"{', '.join(file.name for file in files)}. Keep one, or give a pattern "
                "such as 'data/{language}.jsonl'."
            )
        return files[0]


class TableSource:
    """One file of all languages, told apart by a column.

    Args:
      path: the file.
      data: the settings.
    """

    def __init__(self, path: Path, data: DataConfig) -> None:
        if not is_data(path):
            raise DataError(_unknown_kind(path, path, STREAMED if data.streaming else KINDS))
        if data.language_column is None:
            raise ConfigError(
                f"{path} is one file: say which column names the language (language_column), or "
                "give one file per language, 'data/{language}.jsonl'."
            )
        self.column: str | None = data.language_column
        self._path, self._data = path, data

    def open(self, language: str) -> RecordStream:
        """Return a new stream of all languages' records."""
        return _opened(self._path, self._data)

    def origin(self, language: str) -> Origin:
        """Return what decides all languages' records."""
        return Origin((self._path,))


class HubSource:
    """A hub dataset whose languages are subsets, splits or values of a column.

    Args:
      dataset: its id, or a directory laid out as a hub dataset.
      data: the settings.
    """

    def __init__(self, dataset: str, data: DataConfig) -> None:
        self._dataset, self._data = dataset, data
        self.column: str | None = data.language_column

    def open(self, language: str) -> RecordStream:
        """Return a new stream of a language's records; with a column, of all languages'."""
        name, table = self._table(language)
        return _HubStream(name, table) if self._data.streaming else SequenceStream(name, table)

    def origin(self, language: str) -> Origin:
        """Return what decides a language's records."""
        name, table = self._table(language)
        return Origin(name=f"{name} {table._fingerprint}")

    def _table(self, language: str) -> tuple[str, Any]:
        """A new table of a language's records, and what it is called."""
        import datasets

        data, subset, split = self._data, self._data.subset, self._data.split
        if self.column is None:
            name = data.codes.get(language, language)
            if subset is None and "{language}" not in split:
                subset = "{language}"
            if subset is not None and "{language}" in subset:
                if subset.replace("{language}", name) not in self._subsets:
                    raise MissingLanguageError(
                        f"{missing_language(self._dataset, name, self._subsets)} If its languages "
                        "are told apart by a column, name it in language_column."
                    )
                subset = subset.replace("{language}", name)
            split = split.replace("{language}", name)
        options = {"split": split, "streaming": data.streaming}
        table = self._call(datasets.load_dataset, self._dataset, subset, **options)
        return f"{self._dataset} ({subset or 'default'}, {split})", table

    @functools.cached_property
    def _subsets(self) -> list[str]:
        import datasets

        return self._call(datasets.get_dataset_config_names, self._dataset)

    def _call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        from datasets.exceptions import DatasetsError

        try:
            return function(*arguments, **options)
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(
                f"Cannot load {self._dataset!r} from the Hugging Face hub ({error}). Expected a "
                "hub dataset id, or local files such as 'data/{language}.jsonl'."
            ) from error


class _HubStream(Iterator[Record]):
    """A streamed hub dataset, found again by the state that `datasets` keeps of it."""

    def __init__(self, name: str, table: Any) -> None:
        self._name, self._table = name, table
        self._beginning = table.state_dict()
        self.seek(None)

    def __next__(self) -> Record:
        import pyarrow
        from datasets.exceptions import DatasetsError

        try:
            values = next(self._rows)
        except (ValueError, OSError, pyarrow.ArrowException, DatasetsError) as error:
            # A connection that breaks is no fault of the data, and passed on as it is.
            if not is_damage(error):
                raise
            raise DataError(
                f"{self._name}: cannot be read on after row {self._number} "
                f"({error.__cause__ or error})"
            ) from None
        self._number += 1
        return f"{self._name}: row {self._number}", values

    def position(self) -> list[Any]:
        return [self._number, self._table.state_dict()]

    def seek(self, position: Sequence[Any] | None) -> None:
        self._number, state = position or (0, self._beginning)
        self._table.load_state_dict(state)
        self._rows = iter(self._table)


def open_source(data: DataConfig) -> Source:
    """Return the source that the settings name.

    Args:
      data: the settings. ``data.source`` is one of

        - ``"chatterbot"``, the built-in corpus;
        - a path with ``{language}`` in it, such as ``"data/{language}.jsonl"`` (also ``.json``,
          ``.parquet``, ``.csv``, and those of text compressed, ``.jsonl.gz``, ``.csv.zst``);
        - a directory of files named by language, such as ``en.jsonl``;
        - one such file of all languages, told apart by ``data.language_column``;
        - the id of a hub dataset, ``"owner/name"``;
        - ``"package.module:object"``, a source of one's own, made with ``data.options``.

    Raises:
      ConfigError: one's own cannot be made or is none; the source need not or cannot be streamed,
        or settings contradict each other.
      DataError: it is nothing of these.
    """
    source = data.source
    if source is None:
        raise ConfigError("data.source is missing (Where the examples come from).")
    if is_path(source):
        return OwnSource(data)
    path = typed_path(source)
    if source == BUILT_IN:
        if data.streaming:
            raise ConfigError(
                f"data.streaming is for data that memory does not hold; {BUILT_IN!r} is small. Set "
                "data.streaming=false."
            )
        return Chatterbot()
    if "{language}" in source or path.is_dir():
        return FilesSource(source, data)
    if path.is_file():
        return TableSource(path, data)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not is_data(Path(source)):
        return HubSource(source, data)
    if "/" in source or is_data(Path(source)):
        raise DataError(f"No file or directory {source!r}.")
    built_in = [] if data.streaming else [BUILT_IN]
    raise DataError(
        f"Unknown data source {source!r}.{did_you_mean(source, built_in)} Expected "
        f"{''.join(f'{name!r}, ' for name in built_in)}a path such as 'data/{{language}}.jsonl', a "
        "directory, a hub dataset 'owner/name', or your own 'package.module:object'."
    )


def origins_of(
    data: DataConfig, languages: Sequence[str], source: Source | None = None
) -> dict[str, list[Origin]] | None:
    """Return what decides the records of every language, in all sources that the settings name.

    Args:
      data: the settings.
      languages: their codes.
      source: where the records come from, if not from ``data.source``.

    Returns:
      Per language one `Origin` for each source; None where a source may change unnoticed.

    Raises:
      ConfigError, DataError: a source cannot be opened.
    """
    own = data.own_held_out
    opened = [open_source(one) for one in data.each] if source is None else [source]
    opened += [] if own is None else [open_source(one) for one in own.each]
    found: dict[str, list[Origin]] = {language: [] for language in languages}
    for one in opened:
        for language in languages:
            try:
                what = _origin(one, language)
            except MissingLanguageError:  # that one of several has it is seen to by reading them
                what = Origin(name="none")
            if what is None:
                return None
            found[language].append(what)
    return found


def _origin(source: Any, language: str) -> Origin | None:
    """What decides a language's records; None where nobody says."""
    if type(source).__module__.startswith("jaxmoo."):  # whose code is part of every key
        return source.origin(language)
    return origin_of(source, language)


def missing_language(
    source: str | Path, name: str, available: Iterable[str]
) -> MissingLanguageError:
    """Return the error that a source has no such language."""
    available = sorted(available)
    return MissingLanguageError(
        f"{source} has no language {name!r}. Available: {listed(available) or 'none'}."
        f"{did_you_mean(name, available)}"
    )


def _language_files(source: str, kinds: Sequence[str]) -> dict[str, list[Path]]:
    """The files of each language, by the source's name of it."""
    path = typed_path(source)
    found: dict[str, list[Path]] = {}
    if path.is_dir() and "{language}" not in source:
        for file in sorted(path.iterdir()):
            if is_data(file):
                found.setdefault(file.name[: -len(kind_of(file))], []).append(file)
        return found
    if not is_data(path):
        raise DataError(_unknown_kind(source, path, kinds))
    # The name between the braces may occur several times, "data/{language}/{language}.csv".
    first, *rest = re.escape(str(path)).split(re.escape("{language}"))
    pattern = re.compile(first + "([^/\\\\]+)" + "\\1".join(rest))
    for file in _like(path):
        if match := pattern.fullmatch(str(file)):
            found.setdefault(match[1], []).append(file)
    return found


def _like(path: Path) -> list[Path]:
    """Files whose path may be a pattern's."""
    parts = str(path).split("{language}")
    if is_bucket(path):  # all below the last directory that is the same for all languages
        return list(typed_path(parts[0].rpartition("/")[0]).rglob("*"))
    return [Path(file) for file in sorted(glob.glob("*".join(map(glob.escape, parts))))]


def _opened(path: Path, data: DataConfig) -> RecordStream:
    if data.streaming and not kind_of(path).startswith(STREAMED):
        raise ConfigError(
            f"{path}: a JSON list is read whole and cannot be streamed. Write it as JSON Lines "
            f"({', '.join(STREAMED)} can be streamed), or set data.streaming=false."
        )
    return open_file(path)


def _unknown_kind(source: str | Path, path: Path, kinds: Sequence[str]) -> str:
    return (
        f"{source}: expected a file name ending in {', '.join(kinds)}, found "
        f"{path.suffix or 'no suffix'!r}. Files of text may also be compressed (.gz, .zst)."
    )
