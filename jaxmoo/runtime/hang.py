"""End a run that makes no progress, and show where it stands."""

from __future__ import annotations

import faulthandler
import sys

__all__ = ["HangTimeout"]


class HangTimeout:
    """While the context is open, :meth:`progress` must be called at least so often.

    Otherwise what every thread is doing is written to standard error and the process ends with
    exit code 1: a run of many processes in which one has stopped would wait for it for ever, at
    the price of all. A thread of the interpreter keeps the time, so it works wherever the program
    is stuck.

    Args:
      seconds: between two calls; 0 waits for ever.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> HangTimeout:
        self.progress()
        return self

    def progress(self) -> None:
        """Start counting anew."""
        if self._seconds and sys.__stderr__ is not None:
            # Not sys.stderr, which may be something without a file below it.
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__)

    def __exit__(self, *_: object) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
