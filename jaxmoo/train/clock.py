"""Where a run's time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

__all__ = ["Clock"]


class Clock:
    """Adds up the seconds that parts of a run take, from when it is made.

    *Goodput* is the share of all that time which went into training steps; the rest is compiling,
    evaluation, checkpoints and waiting for data.

    Example:
      >>> clock = Clock()
      >>> with clock.part("data"):
      ...     batch = list(range(10))
      >>> clock.add("step", 0.0)
      >>> sorted(clock.seconds), clock.goodput()
      (['data', 'step'], 0.0)
    """

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time within the context towards a part."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - begun)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def goodput(self) -> float:
        """Return the share of the time so far that went into ``step``."""
        return self.seconds.get("step", 0.0) / (time.perf_counter() - self._begun)
