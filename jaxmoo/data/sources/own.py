"""A source of the user's own, imported from where the settings say, and checked as it is used."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmoo.config.data_section import DataConfig
from jaxmoo.data.sources.records import Origin, Position, Record, RecordStream
from jaxmoo.errors import ConfigError, DataError, shown
from jaxmoo.files.outputs import typed_path
from jaxmoo.registry import check_options, imported

__all__ = ["OwnSource", "origin_of"]

_WANTED = (
    "expected a source, or a function or class that makes one: it has `column` (text or None) and "
    "`open(language)`"
)


class OwnSource:
    """What ``data.source: package.module:object`` names.

    Args:
      data: the settings: the source, and its options.

    Raises:
      ConfigError: there is no such object, it does not take the options, or is no source.
    """

    def __init__(self, data: DataConfig) -> None:
        self._path, self._streamed = str(data.source), data.streaming
        found = imported(self._path, "data source")
        made: Any = found
        if callable(found):
            check_options(found, "data source", self._path, data.options)
            made = found(**data.options)
        _check_source(self._path, made)
        self.column: str | None = made.column
        self._source, self._made_by = made, (found, type(made))

    def open(self, language: str) -> RecordStream:
        """Return a new stream of a language's records, or of all languages'."""
        records = self._source.open(language)
        methods = ["__next__", *(["position", "seek"] if self._streamed else [])]
        lacking = [name for name in methods if not hasattr(records, name)]
        if lacking:
            with_streaming = " with data.streaming" if self._streamed else ""
            raise ConfigError(
                f"Data source {self._path!r}: expected open({language!r}) to return an iterator of "
                f"records that has {', '.join(methods)}{with_streaming}, found "
                f"{type(records).__name__} without {', '.join(lacking)}. "
                "jaxmoo.data.SequenceStream makes one of a list."
            )
        return _Checked(self._path, records)

    def origin(self, language: str) -> Origin | None:
        """Return what decides a language's records, its code included; None if it does not say."""
        return origin_of(self._source, language, *self._made_by)


class _Checked(Iterator[Record]):
    """Records of a stream that nobody has tried before."""

    def __init__(self, path: str, records: Any) -> None:
        self._path, self._records = path, records

    def __next__(self) -> Record:
        record = next(self._records)
        if not (
            isinstance(record, tuple)
            and len(record) == 2
            and isinstance(record[0], str)
            and (record[1] is None or isinstance(record[1], Mapping | DataError))
        ):
            raise ConfigError(
                f"Data source {self._path!r}: expected every record to be a pair of its place, a "
                "text for errors, and its columns, a mapping (or what is wrong with it, a "
                f"DataError); found {shown(record)}."
            )
        return record

    def position(self) -> Position:
        """Return where the next record is."""
        return self._records.position()

    def seek(self, position: Position) -> None:
        """Go to where the next record was."""
        self._records.seek(position)


def origin_of(source: Any, language: str, *made_by: Any) -> Origin | None:
    """Return what decides a language's records: what a source says, and its code.

    Args:
      source: a source of the user's.
      language: the run's code.
      made_by: the functions and classes that it comes from.

    Returns:
      None if the source does not say, or one of these was not defined in a file.
    """
    find = getattr(source, "origin", None)
    found = None if find is None else find(language)
    code = [_file_of(one) for one in made_by]
    if found is None or None in code:
        return None
    return Origin((*found.files, *filter(None, code)), found.name)


def _file_of(thing: Any) -> Path | None:
    """The file in which a function, a class or an object's class is defined."""
    module = getattr(thing, "__module__", None) or type(thing).__module__
    file = getattr(sys.modules.get(module), "__file__", None)
    path = None if file is None else typed_path(file)
    return path if path is not None and path.is_file() else None


def _check_source(path: str, source: Any) -> None:
    """Raise `ConfigError` unless an object is a source."""
    what = f"Data source {path!r}: {_WANTED}; found {type(source).__name__}"
    lacking = [name for name in ("column", "open") if not hasattr(source, name)]
    if lacking:
        raise ConfigError(f"{what} without {' and '.join(lacking)}.")
    if not isinstance(source.column, str | None):
        raise ConfigError(f"{what} with column={shown(source.column)}.")
    try:
        inspect.signature(source.open).bind("en")
    except (TypeError, ValueError):
        raise ConfigError(f"{what} whose open does not take a language alone.") from None
