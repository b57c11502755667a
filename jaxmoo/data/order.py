"""In which order one language's rows come: rows in memory, and rows of a stream."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxmoo.data.packing import Rows
from jaxmoo.data.streaming import ExampleStream, Place
from jaxmoo.data.tokenize import Tokenized
from jaxmoo.errors import DataError

__all__ = ["ShuffledRows", "StreamedRows"]


class ShuffledRows:
    """Rows of examples in memory, shuffled anew in every epoch, addressed by their number.

    Args:
      examples: at least one.
      sequence_length: tokens per row.
      packing: whether rows hold several examples.
      seed: of the language.
    """

    def __init__(
        self, examples: Sequence[Tokenized], sequence_length: int, *, packing: bool, seed: int
    ) -> None:
        self._examples = examples
        lengths = [len(example.tokens) for example in examples]
        self._rows = Rows(lengths, sequence_length, packing=packing, seed=seed)
        self._order = grain.MapDataset.range(len(self._rows)).seed(seed).shuffle().repeat()

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self._rows)

    def row(self, index: int) -> list[Tokenized]:
        """Return the examples of a row; rows are counted through all epochs."""
        members = self._rows.examples(self._order[index], index // len(self))
        return [self._examples[number] for number in members]

    def epochs(self, index: int) -> float:
        """Return how many passes over the rows were made before a row."""
        return index / len(self)

    def mark(self, index: int) -> None:
        """Nothing is needed to find a row again but its number."""

    def seek(self, mark: None) -> None:
        """Every row is at hand."""

    def malformed(self) -> None:
        """Malformed records were counted before."""


class _Mark(NamedTuple):
    """What lies before a piece of a stream, and so all that its rows depend on.

    Attributes:
      row: rows before it.
      number: pieces before it.
      ends: the first row behind each pass that has ended.
      place: where it begins.
    """

    row: int = 0
    number: int = 0
    ends: tuple[int, ...] = ()
    place: Place = Place()


@dataclasses.dataclass(frozen=True)
class _Window:
    """The rows of one piece, and what comes behind it."""

    mark: _Mark
    rows: list[list[Tokenized]]
    behind: _Mark


class StreamedRows:
    """Rows of a stream, each a function of its number, though reading goes forward.

    The stream is read in pieces, and each piece is divided into rows and shuffled by itself, as the
    examples of an epoch are where they are in memory. When it is over it begins again. Two pieces
    are kept; asking for a row before them reads anew from the last place that was sought, or from
    the beginning. So what is in a row does not depend on what was asked before.

    Args:
      stream: the examples.
      sequence_length: tokens per row.
      packing: whether rows hold several examples.
      seed: of the language.
    """

    def __init__(
        self, stream: ExampleStream, sequence_length: int, *, packing: bool, seed: int
    ) -> None:
        self._stream, self._length = stream, sequence_length
        self._packing, self._seed = packing, seed
        self._start = _Mark()
        self._windows: list[_Window] = []

    def row(self, index: int) -> list[Tokenized]:
        """Return the examples of a row; rows are counted through all passes.

        Raises:
          DataError: the stream cannot be read, or has nothing to train on.
        """
        window = self._window(index)
        return window.rows[index - window.mark.row]

    def epochs(self, index: int) -> float:
        """Return how many whole passes were made before a row, as far as was read."""
        ends = self._windows[-1].behind.ends if self._windows else self._start.ends
        return float(bisect.bisect_right(ends, index))

    def malformed(self) -> int:
        """Return the number of malformed records read so far, in all passes."""
        return (self._windows[-1].behind if self._windows else self._start).place.bad

    def mark(self, index: int) -> dict[str, Any]:
        """Return what `seek` needs to find a row again, as JSON holds it."""
        mark = self._window(index).mark
        return mark._asdict() | {"place": mark.place._asdict()}

    def seek(self, mark: Mapping[str, Any]) -> None:
        """Go to where a row was found, so that rows from there on can be read."""
        place, ends = Place(**mark["place"]), tuple(mark["ends"])
        self._start = _Mark(mark["row"], mark["number"], ends, place)
        self._windows = []

    def _window(self, index: int) -> _Window:
        if self._windows and index < self._windows[0].mark.row:
            self._windows = []
        if not self._windows and index < self._start.row:
            self._start = _Mark()
        while not self._windows or index >= self._windows[-1].behind.row:
            last = self._windows[-1].behind if self._windows else self._start
            self._windows = [*self._windows[-1:], self._load(last)]
        return next(w for w in reversed(self._windows) if w.mark.row <= index)

    def _load(self, mark: _Mark) -> _Window:
        """Read the next piece that has something to train on."""
        while True:
            piece = self._stream.read(mark.place)
            self._stream.complain(piece)
            rows = self._rows(self._stream.training(piece), mark.number)
            row, ends = mark.row + len(rows), mark.ends
            if piece.ended:
                if row == (ends[-1] if ends else 0):
                    raise DataError(
                        f"Language {self._stream.language!r}: a whole pass over its records gave "
                        "no example to train on. Give it more data, lower data.held_out, or raise "
                        "data.sequence_length."
                    )
                ends = (*ends, row)
            behind = _Mark(row, mark.number + 1, ends, piece.behind)
            if rows:
                return _Window(mark, rows, behind)
            mark = behind

    def _rows(self, examples: Sequence[Tokenized], number: int) -> list[list[Tokenized]]:
        lengths = [len(example.tokens) for example in examples]
        rows = Rows(lengths, self._length, packing=self._packing, seed=self._seed)
        bits = np.random.Philox(key=self._seed, counter=[0, 0, 1, number])
        order = np.random.Generator(bits).permutation(len(rows))
        return [[examples[i] for i in rows.examples(int(row), number)] for row in order]
