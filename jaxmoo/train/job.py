"""What the parts of a run share while it goes, and where its time goes."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator

from jaxmoo.config import Config
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.runtime.hang import HangTimeout
from jaxmoo.runtime.processes import Agreement
from jaxmoo.runtime.saving import SaveRequest
from jaxmoo.runtime.signals import InterruptedRunError, StopRequest
from jaxmoo.train.setup import Setup

__all__ = ["Clock", "Job"]


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
        self.current = ""  # the part that is going on

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time within the context towards a part."""
        begun = time.perf_counter()
        self.current = name
        try:
            yield
        finally:
            self.current = ""
            self.add(name, time.perf_counter() - begun)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def goodput(self) -> float:
        """Return the share of the time so far that went into ``step``."""
        return self.seconds.get("step", 0.0) / (time.perf_counter() - self._begun)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that is under way.

    Attributes:
      config: its settings.
      setup: its data, model and compiled functions.
      directory: where it writes.
      stop: whether this process is asked to stop.
      saves: whether this process asks for a checkpoint, and all have agreed on one.
      hang: ends it when it makes no progress.
      say: called with lines for a person to read, in the first process alone.
      agreement: how processes agree on these two.
      clock: where its time goes.
    """

    config: Config
    setup: Setup
    directory: RunDirectory
    stop: StopRequest
    saves: SaveRequest
    hang: HangTimeout
    say: Callable[[str], None]
    agreement: Agreement = dataclasses.field(default_factory=Agreement)
    clock: Clock = dataclasses.field(default_factory=Clock)

    def point(self, done: int) -> None:
        """Pass a place where the run may stop, so many steps being done.

        All processes pass the same places in the same order.

        Raises:
          InterruptedRunError: when it shall stop here.
        """
        self.hang.progress()
        number, save = self.agreement.exchange(self.stop.requested() or 0, self.saves.wanted())
        self.saves.agree(bool(save))
        if number:
            asked = signal.Signals(number)
            raise InterruptedRunError(
                f"Stopped by {asked.name} after step {done} of {self.config.train.steps}. The "
                "same command goes on from there.",
                asked,
            )
