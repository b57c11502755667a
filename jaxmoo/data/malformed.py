"""Malformed records: left out and counted up to a share, an error beyond it."""

from __future__ import annotations

from jaxmoo.errors import DataError


class Malformed:
    """The malformed records of a part of a source.

    Args:
      part: what they are a part of, for the error.
      limit: the largest share of all records that may be malformed; at 0 the first is an error.
      before: malformed records found earlier, of a source that is read in pieces, or in another
        way.
      total: how many records there are, if it is known: then the first one too many is an error.

    Attributes:
      complaints: what is wrong with each, with file and line.

    Example:
      >>> malformed = Malformed("language 'en'", 0.1)
      >>> malformed.add(DataError("en.jsonl:7: expected text, found NoneType"))
      >>> malformed.check(good=99)
      >>> len(malformed.complaints)
      1
    """

    def __init__(self, part: str, limit: float, before: int = 0, total: int | None = None):
        self._part, self._limit, self._before = part, limit, before
        self._total = total
        self.complaints: list[str] = []

    def add(self, error: DataError) -> None:
        """Note a malformed record.

        Raises:
          DataError: this one, where none is allowed; or there are too many.
        """
        if not self._limit:
            raise error
        self.complaints.append(str(error))
        bad = self._before + len(self.complaints)
        if self._total is not None and bad > self._limit * self._total:
            self.check(self._total - bad)

    def check(self, good: int) -> None:
        """Compare their number with the limit, once all records, or a piece's, were read.

        Args:
          good: how many records are well formed, those of earlier pieces included.

        Raises:
          DataError: too many are not.
        """
        bad = self._before + len(self.complaints)
        if self.complaints and bad > self._limit * (bad + good):
            raise DataError(
                f"{self.complaints[0]}\nSo or otherwise malformed are {bad:,} of the "
                f"{bad + good:,} records of {self._part}; max_malformed allows a share of "
                f"{self._limit:g}."
            )
