"""How far work has come that takes a while: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

__all__ = ["Progress"]

_EVERY = 30.0  # seconds between two lines
_DELAY = 2.0  # seconds before there is a bar


class Progress:
    """Shows how many of many things are done.

    Args:
      total: how many there are.
      what: what is being done to them, as a line begins.
      unit: what one is called.
      say: called with the lines, where standard error is no terminal.
      clock: tells the seconds.

    Example:
      >>> seconds = iter([0.0, 10.0, 31.0, 40.0])
      >>> with Progress(300, "Counting", "sheep", print, lambda: next(seconds)) as progress:
      ...     for _ in range(3):
      ...         progress.advance(100)
      Counting: 200 of 300 sheep (0:31).
    """

    def __init__(
        self,
        total: int,
        what: str,
        unit: str,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._what, self._unit = total, what, unit
        self._say, self._clock = say, clock
        self._done, self._begun = 0, clock()
        self._next = self._begun + _EVERY
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=what, unit=f" {unit}", delay=_DELAY, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, number: int) -> None:
        """Note that so many more are done."""
        self._done += number
        if self._bar is not None:
            self._bar.update(number)
            return
        now = self._clock()
        if now >= self._next and self._done < self._total:
            self._next = now + _EVERY
            minutes, seconds = divmod(int(now - self._begun), 60)
            self._say(
                f"{self._what}: {self._done:,} of {self._total:,} {self._unit} "
                f"({minutes}:{seconds:02})."
            )
