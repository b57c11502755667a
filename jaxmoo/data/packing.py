"""Which examples of one language share a row: planned from their lengths alone."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from jaxmoo.errors import DataError


def plan_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
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

    def __init__(self, lengths: Sequence[int], capacity: int, *, packing: bool, seed: int):
        self._lengths = np.asarray(lengths, np.int64)
        self._plan = plan_rows(lengths, capacity) if packing else None
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}

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

    def _order(self, epoch: int) -> np.ndarray:
        """Which example takes each place: from the longest, those of equal length shuffled."""
        if epoch not in self._orders:
            random = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, 0, epoch]))
            shuffled = random.random(len(self._lengths))
            # A batch may span two epochs; older ones are not asked for again.
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.lexsort((shuffled, -self._lengths))
        return self._orders[epoch]
