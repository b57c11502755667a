"""Records read one after the other, from any place on: of local files and of hub datasets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxmoo.data.files import KINDS, READERS, Lines, Record, damaged, is_damage, kind_of
from jaxmoo.data.sources import (
    BUILT_IN,
    check_hub_id,
    check_one_file,
    hub_parts,
    language_files,
    load_hub,
)
from jaxmoo.errors import ConfigError, DataError
from jaxmoo.files.outputs import typed_path

# Where the next record is, as JSON holds it; None is the beginning.
Position = Any
_STREAMED = tuple(kind for kind in KINDS if kind != ".json")


class Opened(NamedTuple):
    """The records of a source.

    Attributes:
      streams: per language a stream of its own.
      column: the column that tells the languages apart, where every stream has all of them.
    """

    streams: dict[str, RecordStream]
    column: str | None


class RecordStream(Iterator[Record], Protocol):
    """Records in their order, of which one is in memory at a time, or a block of the file.

    Reading raises `DataError` where the data cannot be read on, `OSError` where the device or the
    network fails.
    """

    def position(self) -> Position:
        """Return where the next record is."""

    def seek(self, position: Position) -> None:
        """Go to where the next record was at another time, perhaps in another process."""


class _TextStream(Iterator[Record]):
    """A file of lines: found again by the number of a byte."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = READERS[kind_of(path)]
        self._lines = Lines(path)
        self._records = self._read(path, self._lines)

    def __next__(self) -> Record:
        return next(self._records)

    def position(self) -> Position:
        return [self._lines.number, self._lines.byte]

    def seek(self, position: Position) -> None:
        self._lines.close()
        self._lines = Lines(self._path, *(position or ()))
        self._records = self._read(self._path, self._lines)


class _TableStream(Iterator[Record]):
    """A streamed dataset: found again by the state that `datasets` keeps of it."""

    def __init__(self, name: str, table: Any) -> None:
        self._name, self._table = name, table
        self._beginning = table.state_dict()
        self.seek(None)

    def __next__(self) -> Record:
        import datasets
        import pyarrow

        try:
            values = next(self._rows)
        except (
            ValueError,
            OSError,
            pyarrow.ArrowException,
            datasets.exceptions.DatasetsError,
        ) as error:
            # A connection that breaks is no fault of the data, and passed on as it is.
            if not is_damage(error):
                raise
            raise DataError(
                f"{self._name}: cannot be read on after row {self._number} "
                f"({error.__cause__ or error})"
            ) from None
        self._number += 1
        return f"{self._name}: row {self._number}", values

    def position(self) -> Position:
        return [self._number, self._table.state_dict()]

    def seek(self, position: Position) -> None:
        self._number, state = position or (0, self._beginning)
        self._table.load_state_dict(state)
        self._rows = iter(self._table)


def open_streams(
    source: str,
    names: Mapping[str, str],
    *,
    language_column: str | None = None,
    subset: str | None = None,
    split: str = "train",
) -> Opened:
    """Open the records of every language.

    Args:
      source: as in :func:`~jaxmoo.data.sources.read_examples`, without the built-in corpus and
        files that have to be read whole (``.json``).
      names: per language the source's name of it.
      language_column: the column that names a record's language, where one table holds them all.
        Then every language reads the whole table.
      subset: a hub dataset's subset, and `split` its split.

    Returns:
      Per language a stream of its own, at the beginning.

    Raises:
      ConfigError: the source need not or cannot be streamed.
      DataError: the source or a language of it cannot be found.
    """
    path = typed_path(source)
    if source == BUILT_IN:
        raise ConfigError(
            f"data.streaming is for data that memory does not hold; {BUILT_IN!r} is small. Set "
            "data.streaming=false."
        )
    if "{language}" in source or path.is_dir():
        files = language_files(source, names, _STREAMED)
        return Opened({language: _file_stream(file) for language, file in files.items()}, None)
    if path.is_file():
        column = check_one_file(path, language_column, _STREAMED)
        return Opened({language: _file_stream(path) for language in names}, column)
    tables = hub_streams(
        check_hub_id(source, streaming=True), names, subset, split, language_column
    )
    return Opened(tables, language_column)


def hub_streams(
    dataset: str,
    names: Mapping[str, str],
    subset: str | None,
    split: str,
    language_column: str | None,
) -> dict[str, RecordStream]:
    """Open a hub dataset, as :func:`~jaxmoo.data.sources.hub_records` reads one.

    Args:
      dataset: its id, or a directory laid out as a hub dataset.
      names: as in `open_streams`, and so are the others.

    Returns:
      Per language its records; with a column of the language those of all.

    Raises:
      DataError: the dataset cannot be loaded, or has no such language.
    """
    if language_column is not None:
        parts = dict.fromkeys(names, (subset, split))
    else:
        parts = hub_parts(dataset, names, subset, split)
    return {
        language: _TableStream(
            f"{dataset} ({subset or 'default'}, {split})",
            load_hub(dataset, subset, split, streaming=True),
        )
        for language, (subset, split) in parts.items()
    }


def _file_stream(path: Path) -> RecordStream:
    kind = kind_of(path)
    if kind == ".parquet":
        import datasets
        import pyarrow

        try:
            table = datasets.load_dataset(
                "parquet", data_files=str(path), split="train", streaming=True
            )
        except (pyarrow.ArrowException, OSError, datasets.exceptions.DatasetsError) as error:
            raise damaged(f"{path}: not a readable Parquet file", error) from None
        return _TableStream(str(path), table)
    if not kind.startswith(_STREAMED):
        raise ConfigError(
            f"{path}: a JSON list is read whole and cannot be streamed. Write it as JSON Lines "
            f"({', '.join(_STREAMED)} can be streamed), or set data.streaming=false."
        )
    return _TextStream(path)
