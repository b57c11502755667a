"""Reading records from local files, with the file and line in every complaint."""

from __future__ import annotations

import codecs
import contextlib
import csv
import functools
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from jaxmoo.errors import DataError

# Where a record was found, "data/en.jsonl:12" or "data/en.parquet: row 12", and the record, or what
# is wrong with it.
Record = tuple[str, Mapping[str, Any] | DataError]

LONGEST_LINE = 2**26  # bytes; what is longer is passed over without being held
_PART = 2**20


class Lines(Iterator[bytes]):
    """The lines of a file from any of them on.

    Of a line longer than `LONGEST_LINE` only its beginning is kept.

    Args:
      path: the file; ``.gz`` and ``.zst`` are decompressed on the way.
      number: lines before the first one.
      byte: where the first one begins, in what was decompressed; there all before it is
        decompressed again.

    Attributes:
      number: lines read so far, those before the first one included; so the last one's number.
      byte: where the next one begins.
      cut: whether the last one read was too long.

    Raises:
      DataError: while reading, if a compressed file is damaged.
    """

    def __init__(self, path: Path, number: int = 0, byte: int = 0):
        self.number, self.byte, self.cut = number, byte, False
        self._path = path
        self._file = _opened(path)
        if path.suffix.lower() not in _COMPRESSIONS:
            self._file.seek(byte)
            return
        with contextlib.suppress(StopIteration):
            while byte:
                byte -= len(self._read(self._file.read, min(byte, _PART)))

    def __next__(self) -> bytes:
        line = self._read(self._file.readline, LONGEST_LINE)
        self.number += 1
        self.byte += len(line)
        self.cut = len(line) == LONGEST_LINE and not line.endswith(b"\n")
        if not self.cut:
            return line
        with contextlib.suppress(StopIteration):
            rest = line
            while not rest.endswith(b"\n"):
                rest = self._read(self._file.readline, _PART)
                self.byte += len(rest)
        return line[:80]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            found = read(size)
        except (OSError, EOFError, zlib.error) as error:
            raise damaged(f"{self._path}: damaged behind line {self.number}", error) from None
        if not found:
            raise StopIteration
        return found


def is_damage(error: Exception) -> bool:
    """Whether a failure to read tells of what is in a file, not of a device or a connection."""
    # Arrow and gzip have no other error for damaged bytes than the system's, without its number.
    system = isinstance(error, OSError)
    return not system or (error.errno is None and type(error) in (OSError, gzip.BadGzipFile))


def damaged(what: str, error: Exception) -> Exception:
    """Return the error to raise where reading failed: one of the data, or the failure itself."""
    return DataError(f"{what} ({error}). Write it again.") if is_damage(error) else error


def _opened(path: Path) -> BinaryIO:
    return _COMPRESSIONS.get(path.suffix.lower(), functools.partial(open, mode="rb"))(path)


def _open_zstd(path: Path) -> BinaryIO:
    import pyarrow

    # Python's own decompressor came with 3.14.
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_COMPRESSIONS: dict[str, Callable[[Path], BinaryIO]] = {".gz": gzip.open, ".zst": _open_zstd}


def kind_of(path: Path) -> str:
    """Return what a file is by its name: ``.jsonl``, ``.csv.gz``, ...; its suffix, if nothing.

    Example:
      >>> kind_of(Path("data/en.JSONL.gz")), kind_of(Path("en.v2.csv")), kind_of(Path("en.txt"))
      ('.jsonl.gz', '.csv', '.txt')
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((kind for n in (2, 1) if (kind := "".join(suffixes[-n:])) in READERS), path.suffix)


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of one local file.

    JSON Lines, JSON (a list of objects) and CSV (with a header), compressed or not, are parsed
    here, so that a malformed record is reported by file and line; Parquet is read by ``datasets``,
    which keeps it on disk in its cache.

    Args:
      path: a file whose name ends in one of `READERS`.

    Yields:
      Pairs of a place ("file:line") and a record, or a `DataError` in the place of one that is not
      an object of its own.

    Raises:
      DataError: the file is not what its suffix says, and reading cannot go on.
    """
    return READERS[kind_of(path)](path)


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
      DataError: it is none, whose cause says where, or nothing that Python holds.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"invalid JSON ({error.msg} at column {error.colno})") from error
    except ValueError:  # Python's limit of whole numbers
        raise DataError("a number of thousands of digits") from None
    except RecursionError:
        raise DataError("lists or objects nested too deep") from None


def _decoded(number: int, line: bytes, errors: str = "strict") -> str:
    # Only the first line may carry a byte order mark.
    return line.decode("utf-8-sig" if number == 1 else "utf-8", errors)


def _not_utf8(place: str, error: UnicodeError) -> DataError:
    return DataError(f"{place}: not UTF-8 text ({error.reason}). Convert the file to UTF-8.")


def _too_long(place: str, line: bytes) -> DataError:
    return DataError(
        f"{place}: a line of more than {LONGEST_LINE:,} bytes: {line!r}... Divide what it holds."
    )


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
                    record: Mapping[str, Any] | DataError = _parsed_line(path, lines, line)
                except DataError as error:
                    record = error
                yield f"{path}:{number}", record


def _parsed_line(path: Path, lines: Lines, line: bytes) -> Mapping[str, Any]:
    place = f"{path}:{lines.number}"
    if lines.cut:
        raise _too_long(place, line)
    try:
        text = _decoded(lines.number, line)
    except UnicodeDecodeError as error:
        raise _not_utf8(place, error) from None
    try:
        record = parse_json(text)
    except DataError as error:
        raise DataError(
            f"{place}: expected one JSON object per line, found {error}: {text[:80].strip()!r}"
        ) from None
    if not isinstance(record, dict):
        raise DataError(f"{place}: expected a JSON object, found {type(record).__name__}")
    return record


def _read_json(path: Path) -> Iterator[Record]:
    with contextlib.closing(_opened(path)) as file:
        try:
            content = file.read()
        except (OSError, EOFError, zlib.error) as error:
            raise damaged(f"{path}: damaged", error) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{path}:{line}", error) from None
    try:
        records = parse_json(text)
    except DataError as error:
        cause = error.__cause__
        if not isinstance(cause, json.JSONDecodeError):
            raise DataError(f"{path}: {error}") from None
        hint = " Is it JSON Lines? Then name it .jsonl." if cause.msg == "Extra data" else ""
        raise DataError(f"{path}:{cause.lineno}: invalid JSON ({cause.msg}).{hint}") from None
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
        header = next(csv.reader(_csv_lines(path, Lines(path)), strict=True))
    reader = csv.reader(_csv_lines(path, lines), strict=True)
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
            twice = [name for name, count in Counter(row).items() if count > 1]
            if twice:
                raise DataError(f"{place}: several columns are named {twice[0]!r}.")
            header = row
        elif row:
            yield place, _csv_record(place, header, row)


def _csv_record(place: str, header: list[str], row: list[str]) -> Mapping[str, str] | DataError:
    if len(row) != len(header):
        found = f"expected {len(header)} fields as in the header, found {len(row)}"
        return DataError(f"{place}: {found}")
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        bad = "".join(row).encode("utf-8", "surrogateescape")
        try:
            bad.decode()
        except UnicodeDecodeError as error:
            return _not_utf8(place, error)
    return dict(zip(header, row, strict=True))


def _csv_lines(path: Path, lines: Lines) -> Iterator[str]:
    with contextlib.closing(lines):
        for line in lines:
            if lines.cut:
                raise _too_long(f"{path}:{lines.number}", line)
            # A byte that is no UTF-8 spoils its record, not those behind it.
            yield _decoded(lines.number, line, "surrogateescape")


def _read_parquet(path: Path) -> Iterator[Record]:
    import datasets
    import pyarrow

    try:
        table = datasets.Dataset.from_parquet(str(path))
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError) as error:
        cause = error.__cause__ or error
        raise damaged(f"{path}: not a readable Parquet file", cause) from None
    read = 0
    try:
        for record in table:
            read += 1
            yield f"{path}: row {read}", record
    except UnicodeDecodeError:
        # One by one, which is slower, all but the bad ones can be read.
        for row in range(read, len(table)):
            place = f"{path}: row {row + 1}"
            try:
                record = table[row]
            except UnicodeDecodeError as error:
                record = _not_utf8(place, error)
            yield place, record


READERS: dict[str, Callable[..., Iterator[Record]]] = {
    ".jsonl": read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": read_csv,
}
KINDS = tuple(READERS)  # of files, without compression
READERS |= {
    kind + compression: READERS[kind]
    for compression in _COMPRESSIONS
    for kind in KINDS
    if kind != ".parquet"
}
