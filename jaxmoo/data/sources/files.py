"""Reading records from local files, with the file and line in every complaint."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from jaxmoo.data.sources.records import Record, RecordStream, SequenceStream, parse_json
from jaxmoo.errors import DataError
from jaxmoo.files.buckets import is_bucket

LONGEST_LINE = 2**26  # bytes; what is longer is passed over without being held
_PART = 2**20
_ROWS = 1000  # of a Parquet file, decoded at a time


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
    return _COMPRESSIONS.get(path.suffix.lower(), _open_plain)(path)


def _open_plain(path: Path) -> BinaryIO:
    return path.open("rb")


def _open_gzip(path: Path) -> BinaryIO:
    # All that is asked of one.
    return cast(BinaryIO, gzip.open(path.open("rb") if is_bucket(path) else path))


def _open_zstd(path: Path) -> BinaryIO:
    import pyarrow

    # Python's own decompressor came with 3.14.
    source = path.open("rb") if is_bucket(path) else str(path)
    return io.BufferedReader(pyarrow.input_stream(source, compression="zstd"))


_COMPRESSIONS: dict[str, Callable[[Path], BinaryIO]] = {".gz": _open_gzip, ".zst": _open_zstd}


KINDS = (".jsonl", ".json", ".parquet", ".csv")  # of files, without compression
STREAMED = (".jsonl", ".parquet", ".csv")  # those that need not be read whole
_ALL_KINDS = {
    *KINDS,
    *(kind + end for end in _COMPRESSIONS for kind in KINDS if kind != ".parquet"),
}


def is_data(path: Path) -> bool:
    """Whether a file is one of those that are read, by its name."""
    return kind_of(path) in _ALL_KINDS


def kind_of(path: Path) -> str:
    """Return what a file is by its name: ``.jsonl``, ``.csv.gz``, ...; its suffix, if nothing.

    Example:
      >>> kind_of(Path("data/en.JSONL.gz")), kind_of(Path("en.v2.csv")), kind_of(Path("en.txt"))
      ('.jsonl.gz', '.csv', '.txt')
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next(
        (kind for n in (2, 1) if (kind := "".join(suffixes[-n:])) in _ALL_KINDS), path.suffix
    )


def open_file(path: Path) -> RecordStream:
    """Open the records of one local file.

    JSON Lines, JSON (a list of objects) and CSV (with a header), compressed or not, are parsed
    here, so that a malformed record is reported by file and line. A list of JSON is read whole.

    Args:
      path: a file whose name ends in one of `KINDS`, or such a one compressed.

    Returns:
      Its records, with a `DataError` in the place of one that is not an object of its own.

    Raises:
      DataError: the file is not what its suffix says.
    """
    kind = kind_of(path)
    if kind.startswith(".parquet"):
        return ParquetStream(path)
    if kind.startswith(".json") and not kind.startswith(".jsonl"):
        return SequenceStream(str(path), _read_json(path), "record")
    return TextStream(path)


class TextStream(Iterator[Record]):
    """The records of a file of lines, found again by the number of a byte."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = _read_jsonl if kind_of(path).startswith(".jsonl") else _read_csv
        self._lines = Lines(path)
        self._records = self._read(path, self._lines)

    def __next__(self) -> Record:
        return next(self._records)

    def position(self) -> list[int]:
        """Return how many lines and bytes come before the next record."""
        return [self._lines.number, self._lines.byte]

    def seek(self, position: list[int] | None) -> None:
        """Go to a byte where a record began."""
        self._lines.close()
        self._lines = Lines(self._path, *(position or ()))
        self._records = self._read(self._path, self._lines)


class ParquetStream(Iterator[Record]):
    """The rows of a Parquet file, found again by their number."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self._path = path
        try:
            source = path.open("rb") if is_bucket(path) else path
            self._file = pyarrow.parquet.ParquetFile(source)
        except (pyarrow.ArrowException, OSError) as error:
            raise damaged(f"{path}: not a readable Parquet file", error) from None
        self.seek(None)

    def __next__(self) -> Record:
        import pyarrow

        try:
            values = next(self._rows)
        except (pyarrow.ArrowException, OSError) as error:
            # What fails to be read at all is no fault of the data, and passed on as it is.
            if not is_damage(error):
                raise
            raise DataError(
                f"{self._path}: cannot be read on after row {self._number} ({error})"
            ) from None
        self._number += 1
        place = f"{self._path}: row {self._number}"
        return place, _not_utf8(place, values) if isinstance(values, UnicodeDecodeError) else values

    def position(self) -> list[int]:
        """Return how many rows come before the next."""
        return [self._number]

    def seek(self, position: list[Any] | None) -> None:
        """Go to the row behind so many."""
        self._number = position[0] if position else 0
        self._rows = self._from(self._number)

    def _from(self, first: int) -> Iterator[Mapping[str, Any] | UnicodeDecodeError]:
        for group in range(self._file.num_row_groups):
            size = self._file.metadata.row_group(group).num_rows
            if first >= size:
                first -= size
                continue
            for batch in self._file.iter_batches(_ROWS, row_groups=[group]):
                here, first = batch.slice(min(first, len(batch))), max(first - len(batch), 0)
                try:
                    yield from here.to_pylist()
                except UnicodeDecodeError:
                    # One by one, which is slower, all but the bad ones can be read.
                    for row in range(len(here)):
                        try:
                            yield here.slice(row, 1).to_pylist()[0]
                        except UnicodeDecodeError as error:
                            yield error


def _decoded(number: int, line: bytes, errors: str = "strict") -> str:
    # Only the first line may carry a byte order mark.
    return line.decode("utf-8-sig" if number == 1 else "utf-8", errors)


def _not_utf8(place: str, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{place}: not UTF-8 text ({error.reason}). Convert the file to UTF-8.")


def _too_long(place: str, line: bytes) -> DataError:
    return DataError(
        f"{place}: a line of more than {LONGEST_LINE:,} bytes: {line!r}... Divide what it holds."
    )


def _read_jsonl(path: Path, lines: Lines) -> Iterator[Record]:
    """Yield the records of a file of JSON Lines; between two, the lines stand between them, too."""
    with contextlib.closing(lines) as lines:
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


def _read_json(path: Path) -> list[Mapping[str, Any] | DataError]:
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
    return [
        record
        if isinstance(record, dict)
        else DataError(
            f"{path}: record {number}: expected a JSON object, found {type(record).__name__}"
        )
        for number, record in enumerate(records, start=1)
    ]


def _read_csv(path: Path, lines: Lines) -> Iterator[Record]:
    """Yield the records of a CSV file with a header; the lines begin with that or with a record."""
    # One field may hold a whole document; the module's own limit is 128 KiB.
    csv.field_size_limit(2**31 - 1)
    header: list[str] = []
    if lines.byte:
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
