"""When a checkpoint is asked for by something other than the number of steps."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["SaveRequest"]


class SaveRequest:
    """Asks for a checkpoint every so many seconds, and when it is told to.

    What this process asks for counts only when all of them have agreed on it
    (:class:`jaxmoo.runtime.processes.Agreement`). So it is asked once, in :meth:`wanted`, then
    agreed on (:meth:`agree`), maybe while something is evaluated, and taken (:meth:`take`) where a
    checkpoint can be saved.

    Args:
      seconds: between two checkpoints; None asks for none by time. Of several processes only one
        goes by its clock.
      clock: in seconds; may not jump when somebody sets the time.

    Example:
      >>> now = [0.0]
      >>> saves = SaveRequest(600, clock=lambda: now[0])
      >>> saves.wanted()
      False
      >>> now[0] = 601.0
      >>> saves.wanted(), saves.wanted()  # asked once
      (True, False)
    """

    def __init__(
        self, seconds: float | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds, self._clock = seconds, clock
        self._asked = self._agreed = False
        self.restart()

    def restart(self) -> None:
        """Count the time from now on: a checkpoint is being saved, or training begins."""
        self._last = self._clock()

    def ask(self) -> None:
        """Ask for one as soon as may be; from any thread."""
        self._asked = True

    def wanted(self) -> bool:
        """Return whether this process asks for a checkpoint now; it does so once."""
        asked, self._asked = self._asked, False
        if self._seconds is not None and self._clock() - self._last >= self._seconds:
            self.restart()
            asked = True
        return asked

    def agree(self, wanted: bool) -> None:
        """Note what all processes have agreed on."""
        self._agreed |= wanted

    def take(self) -> bool:
        """Return whether a checkpoint is to be saved here; it is no longer, then."""
        agreed, self._agreed = self._agreed, False
        return agreed
