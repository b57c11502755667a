"""A source of the user's own, imported from where the settings say, and checked as it is used."""

from __future__ import annotations

import inspect
import json
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
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
        # The object may come from elsewhere: what is named there says how it is made.
        self._source, self._made_by = made, (sys.modules[self._path.partition(":")[0]], found)

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
        position = self._records.position()
        try:
            return json.loads(json.dumps(position))  # as a resumed run will get it
        except (TypeError, ValueError):
            raise ConfigError(
                f"Data source {self._path!r}: expected position() to return what JSON holds (a "
                f"number, a text, a list or mapping of such), found {shown(position)}."
            ) from None

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
      None if the source does not say, or code of its was not read from a file as it is now.

    Raises:
      ConfigError: it says it in another form.
    """
    find = getattr(source, "origin", None)
    found = None if find is None else find(language)
    if found is None:
        return None
    if not isinstance(found, Origin) or isinstance(found.files, str | Path):
        raise ConfigError(
            f"Data source {type(source).__name__}: expected origin({language!r}) to return a "
            f"jaxmoo.data.Origin of a list of files and a name, or None, found {shown(found)}."
        )
    modules = {name: None for one in (*made_by, source) for name in _modules_of(one)}
    code = [file for name in modules if (file := _unchanged_file(name)) is not None]
    if len(code) < len(modules):
        return None
    return Origin((*map(typed_path, found.files), *code), found.name)


def _modules_of(thing: Any) -> list[str]:
    """The modules in which a function, or a class or object with all it inherits, is defined."""
    if isinstance(thing, ModuleType):
        return [thing.__name__]
    if inspect.isfunction(thing):
        return [thing.__module__]
    kind = thing if isinstance(thing, type) else type(thing)
    names = (one.__module__ for one in kind.__mro__)
    return [name for name in names if name.partition(".")[0] not in sys.stdlib_module_names]


# Files of code, as they were when first asked for: what was imported is no other.
_files: weakref.WeakKeyDictionary[ModuleType, tuple[int, int]] = weakref.WeakKeyDictionary()


def _unchanged_file(module: str) -> Path | None:
    """The file of a module; None if it has none, or it was changed since it was imported."""
    found = sys.modules.get(module)
    path = None if found is None or found.__file__ is None else typed_path(found.__file__)
    if found is None or path is None or not path.is_file():
        return None
    stat = path.stat()
    now = (stat.st_mtime_ns, stat.st_size)
    return path if _files.setdefault(found, now) == now else None


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
