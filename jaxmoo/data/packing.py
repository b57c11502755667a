"""Rows of one language: which examples share one (packing), and in which order they come."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import numpy as np

from jaxmoo.data.shuffle import epoch_order
from jaxmoo.data.streaming import ExampleStream, Piece, Place
from jaxmoo.data.token_table import TokenTable
from jaxmoo.data.tokenization.tokenize import Tokenized
from jaxmoo.errors import DataError

__all__ = ["Rows", "ShuffledRows", "StreamedRows", "plan_rows"]

_KEPT = 2  # epochs whose order is kept: a batch may span two


def plan_rows(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Divide examples among as few rows as best-fit-decreasing finds.

    The longest example comes first, and each goes into the row that it leaves least room in. That
    needs at most 11/9 of the fewest rows possible (plus one), and with many short examples almost
    none too many.

    The plan knows *places*, not examples: place p is taken by any p-th longest example. So an epoch
    may deal examples of equal length anew among their places, and has the same number of rows.

    Args:
      lengths: the examples' lengths in tokens, in any order.
      capacity: tokens per row.

    Returns:
      Per row its places, numbers into the lengths sorted from the longest.

    Raises:
      DataError: an example is longer than a row.

    Example:
      >>> plan_rows([3, 6, 2, 5], 8)
      [[0, 3], [1, 2]]
    """
    ordered = sorted(map(int, lengths), reverse=True)
    if ordered and ordered[0] > capacity:
        raise DataError(f"An example of {ordered[0]} tokens does not fit a row of {capacity}.")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # by the room that is left
    rooms: list[int] = []  # the keys, ascending
    for place, length in enumerate(ordered):
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            rows.append([])
            number, room = len(rows) - 1, capacity
        else:
            room = rooms[at]
            number = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        rows[number].append(place)
        left = room - length
        if left not in open_rows:
            open_rows[left] = []
            bisect.insort(rooms, left)
        open_rows[left].append(number)
    return rows


class Rows:
    """The rows of one language's epoch, and which examples lie in them in each epoch.

    Args:
      lengths: the examples' lengths in tokens.
      capacity: tokens per row.
      packing: whether rows hold several examples; if not, row i is example i in every epoch.
      seed: of the language.

    Example:
      >>> rows = Rows([3, 6, 2, 5], 8, packing=True, seed=0)
      >>> len(rows), rows.examples(0, epoch=0), rows.examples(1, epoch=0)
      (2, [1, 2], [3, 0])
    """

    def __init__(
        self, lengths: Sequence[int] | np.ndarray, capacity: int, *, packing: bool, seed: int
    ) -> None:
        self._lengths = np.asarray(lengths, np.int64)
        self._plan = plan_rows(lengths, capacity) if packing else None
        self._seed = seed
        self._order = functools.lru_cache(_KEPT)(self._dealt)

    def __len__(self) -> int:
        return len(self._lengths if self._plan is None else self._plan)

    def examples(self, row: int, epoch: int) -> list[int]:
        """Return the numbers of the examples in a row, in the order in which they lie there.

        Args:
          row: from 0.
          epoch: from 0.
        """
        if self._plan is None:
            return [row]
        order = self._order(epoch)
        return [int(order[place]) for place in self._plan[row]]

    def _dealt(self, epoch: int) -> np.ndarray:
        """Which example takes each place: from the longest, those of equal length shuffled."""
        random = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, 0, epoch]))
        return np.lexsort((random.random(len(self._lengths)), -self._lengths))


class ShuffledRows:
    """Rows of examples in memory, shuffled anew in every epoch, addressed by their number.

    Args:
      examples: at least one.
      sequence_length: tokens per row.
      packing: whether rows hold several examples.
      seed: of the language.
    """

    def __init__(
        self, examples: TokenTable, sequence_length: int, *, packing: bool, seed: int
    ) -> None:
        self._examples = examples
        self._rows = Rows(examples.sizes, sequence_length, packing=packing, seed=seed)
        order = functools.partial(epoch_order, len(self._rows), seed)
        self._order = functools.lru_cache(_KEPT)(order)

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self._rows)

    def row(self, index: int) -> list[Tokenized]:
        """Return the examples of a row; rows are counted through all epochs."""
        return [self._examples[number] for number in self._members(index)]

    def size(self, index: int) -> int:
        """Return the number of tokens in a row."""
        return int(self._examples.sizes[self._members(index)].sum())

    def _members(self, index: int) -> list[int]:
        epoch, place = divmod(index, len(self))
        return self._rows.examples(int(self._order(epoch)[place]), epoch)

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
    """The rows of one piece, what comes behind it, and the pieces that were read for it."""

    mark: _Mark
    rows: list[list[Tokenized]]
    behind: _Mark
    read: list[Piece]


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
        self._pool: Executor | None = None
        self._ahead: tuple[_Mark, Future[_Window]] | None = None

    def read_ahead(self, pool: Executor | None) -> None:
        """Read the next piece while the rows of the last are used, or no longer.

        What was read ahead counts as read only when it is used.

        Args:
          pool: of one thread, which reads for all streams of a tokenizer; all its work is done, or
            cancelled, when this is None.
        """
        self._pool, self._ahead = pool, None

    def row(self, index: int) -> list[Tokenized]:
        """Return the examples of a row; rows are counted through all passes.

        Raises:
          DataError: the stream cannot be read, or has nothing to train on.
        """
        window = self._window(index)
        return window.rows[index - window.mark.row]

    def size(self, index: int) -> int:
        """Return the number of tokens in a row."""
        return sum(len(example.tokens) for example in self.row(index))

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
            self._windows = [*self._windows[-1:], self._next(last)]
        return next(w for w in reversed(self._windows) if w.mark.row <= index)

    def _next(self, mark: _Mark) -> _Window:
        """The window that begins at a mark; the one behind it is begun."""
        if self._pool is None:
            window = self._load(mark)
        else:
            # In the pool in any case: nothing else may read from the stream meanwhile.
            begun, future = self._ahead or (None, None)
            if future is None or begun != mark:
                future = self._pool.submit(self._load, mark)
            window = future.result()
            self._ahead = window.behind, self._pool.submit(self._load, window.behind)
        for piece in window.read:
            self._stream.complain(piece)
        return dataclasses.replace(window, read=[])

    def _load(self, mark: _Mark) -> _Window:
        """Read the next piece that has something to train on."""
        read = []
        while True:
            piece = self._stream.read(mark.place)
            read.append(piece)
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
                return _Window(mark, rows, behind, read)
            mark = behind

    def _rows(self, examples: Sequence[Tokenized], number: int) -> list[list[Tokenized]]:
        lengths = [len(example.tokens) for example in examples]
        rows = Rows(lengths, self._length, packing=self._packing, seed=self._seed)
        bits = np.random.Philox(key=self._seed, counter=[0, 0, 1, number])
        order = np.random.Generator(bits).permutation(len(rows))
        return [[examples[i] for i in rows.examples(int(row), number)] for row in order]
