"""Reading records from local files, with the file and line in every complaint."""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmoo.errors import DataError

# Where a record was found, "data/en.jsonl:12" or "data/en.parquet: row 12", and the record, or what
# is wrong with it.
Record = tuple[str, Mapping[str, Any] | DataError]


class Lines(Iterator[bytes]):
    """The lines of a file from any of them on.

    Args:
      path: the file.
      number: lines before the first one.
      byte: where the first one begins.

    Attributes:
      number: lines read so far, those before the first one included; so the last one's number.
      byte: where the next one begins.
    """

    def __init__(self, path: Path, number: int = 0, byte: int = 0):
        self.number, self.byte = number, byte
        self._file = path.open("rb")
        self._file.seek(byte)

    def __next__(self) -> bytes:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self.number += 1
        self.byte += len(line)
        return line

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of one local file.

    JSON Lines, JSON (a list of objects) and CSV (with a header) are parsed here, so that a
    malformed record is reported by file and line; Parquet is read by ``datasets``, which keeps it
    on disk in its cache.

    Args:
      path: a file whose suffix is one of `READERS`.

    Yields:
      Pairs of a place ("file:line") and a record, or a `DataError` in the place of one that is not
      an object of its own.

    Raises:
      DataError: the file is not what its suffix says, and reading cannot go on.
    """
    return READERS[path.suffix.lower()](path)


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        # Only the first line may carry a byte order mark.
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: not UTF-8 text ({error.reason}). Convert the file to UTF-8."
        ) from None


def _decoded_lines(path: Path, lines: Lines) -> Iterator[str]:
    with contextlib.closing(lines):
        for line in lines:
            yield _decoded(path, lines.number, line)


def read_jsonl(path: Path, lines: Lines | None = None) -> Iterator[Record]:
    """Yield the records of a file of JSON Lines, as `read_records` does.

    Args:
      path: the file.
      lines: its lines, from where to begin; all of them by default. Between two records they stand
        behind the one and before the other.
    """
    with contextlib.closing(lines or Lines(path)) as lines:
        for line in lines:
            number = lines.number
            if line.removeprefix(codecs.BOM_UTF8).strip():
                try:
                    record: Mapping[str, Any] | DataError = _parsed_line(path, number, line)
                except DataError as error:
                    record = error
                yield f"{path}:{number}", record


def _parsed_line(path: Path, number: int, line: bytes) -> Mapping[str, Any]:
    text = _decoded(path, number, line).strip()
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{number}: expected one JSON object per line, found invalid JSON "
            f"({error.msg} at column {error.colno}): {text[:80]!r}"
        ) from None
    if not isinstance(record, dict):
        raise DataError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
    return record


def _read_json(path: Path) -> Iterator[Record]:
    text = "".join(_decoded_lines(path, Lines(path)))
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        hint = " Is it JSON Lines? Then name it .jsonl." if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: invalid JSON ({error.msg}).{hint}") from None
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a JSON list of objects, found {type(records).__name__}")
    for number, record in enumerate(records, start=1):
        place = f"{path}: record {number}"
        if isinstance(record, dict):
            yield place, record
        else:
            found = type(record).__name__
            yield place, DataError(f"{place}: expected a JSON object, found {found}")


def read_csv(path: Path, lines: Lines | None = None) -> Iterator[Record]:
    """Yield the records of a CSV file with a header, as `read_records` does.

    Args:
      path: the file.
      lines: as in `read_jsonl`; they begin with the header or with a record.
    """
    # One field may hold a whole document; the module's own limit is 128 KiB.
    csv.field_size_limit(2**31 - 1)
    header: list[str] = []
    if lines is None:
        lines = Lines(path)
    elif lines.byte:
        header = next(csv.reader(_decoded_lines(path, Lines(path)), strict=True))
    reader = csv.reader(_decoded_lines(path, lines), strict=True)
    while True:
        # Where the record begins; a quoted field may hold line breaks.
        place = f"{path}:{lines.number + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{place}: invalid CSV ({error})") from None
        if not header:
            header = row
        elif len(row) == len(header):
            yield place, dict(zip(header, row, strict=True))
        elif row:
            yield (
                place,
                DataError(
                    f"{place}: expected {len(header)} fields as in the header, found {len(row)}"
                ),
            )


def _read_parquet(path: Path) -> Iterator[Record]:
    import datasets
    import pyarrow

    try:
        table = datasets.Dataset.from_parquet(str(path))
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        raise DataError(
            f"{path}: not a readable Parquet file ({error.__cause__ or error})"
        ) from None
    for number, record in enumerate(table, start=1):
        yield f"{path}: row {number}", record


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": read_csv,
}
