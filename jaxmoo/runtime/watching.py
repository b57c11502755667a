"""Progress for people: a bar on a terminal, and elsewhere lines as time passes."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from tqdm import tqdm

__all__ = ["Heartbeat", "clock_time", "interval", "terminal_width", "watched"]

QUIET = 60.0  # seconds without a line after which a log gets one


def clock_time() -> str:
    """Return date and time, as lines of a log begin with."""
    return time.strftime("%Y-%m-%d %H:%M:%S")


def interval(seconds: float) -> str:
    """Return a time span.

    Example:
      >>> interval(75), interval(3675)
      ('01:15', '1:01:15')
    """
    return tqdm.format_interval(seconds)


def terminal_width() -> int | None:
    """Return how many columns standard output shows; None if it is no terminal."""
    try:
        if not sys.stdout.isatty():
            return None
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError, AttributeError):  # it is gone, or something without a file
        return None
    return columns or shutil.get_terminal_size().columns  # 0: unknown


class Heartbeat:
    """Calls a function whenever nothing has been heard for some time, while the context is open.

    A thread does, so it goes on during a long step or compilation.

    Args:
      beat: called with the seconds since something was heard.
      every: seconds.
    """

    def __init__(self, beat: Callable[[float], object], every: float = QUIET) -> None:
        self._beat, self._every = beat, every
        self._over = threading.Event()
        self._heard = self._last = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def heard(self) -> None:
        """Note that a line was shown."""
        self._heard = self._last = time.monotonic()

    def _run(self) -> None:
        while not self._over.wait(max(self._last + self._every - time.monotonic(), 0.01)):
            now = time.monotonic()
            if now - self._last >= self._every:
                self._last = now
                with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                    self._beat(now - self._heard)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@contextlib.contextmanager
def watched(
    total: int,
    what: str,
    *,
    unit: str = "it",
    shown: bool = True,
    file: TextIO | None = None,
    every: float = QUIET,
) -> Iterator[Callable[[int], object]]:
    """Show how far something has come, if it takes more than a moment.

    On a terminal that is a bar; elsewhere a line every minute.

    Args:
      total: how many there are.
      what: what is done with them, ``"evaluating"``.
      unit: what one is called.
      shown: whether to show anything.
      file: where to; standard error by default.
      every: seconds between lines.

    Yields:
      A function to call with the number of those that have been done since the last call.
    """
    out = file or sys.stderr
    if not shown:
        yield lambda count: None
        return
    if out.isatty():
        with tqdm(total=total, desc=what, unit=unit, file=out, dynamic_ncols=True) as bar:
            yield bar.update
        return
    done, begun, first = 0, time.monotonic(), (0, 0.0)

    def advance(count: int) -> None:
        nonlocal done, first
        done += count
        if not first[0]:
            first = done, time.monotonic()

    def beat(quiet: float) -> None:
        now = time.monotonic()
        left = "?"
        if done > first[0]:  # the first ones waited for the compiler
            left = interval((now - first[1]) / (done - first[0]) * (total - done))
        print(
            f"{clock_time()}  {what}: {done:,} of {total:,} {unit}s "
            f"[{interval(now - begun)}<{left}]",
            file=out,
            flush=True,
        )

    with Heartbeat(beat, every):
        yield advance
