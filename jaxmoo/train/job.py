"""What the parts of a run share while it goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxmoo.config.training import Config
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.runtime.hang import HangTimeout
from jaxmoo.runtime.signals import InterruptedRunError, StopRequest
from jaxmoo.train.clock import Clock
from jaxmoo.train.setup import Setup

__all__ = ["Job"]


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that is under way.

    Attributes:
      config: its settings.
      setup: its data, model and compiled functions.
      directory: where it writes.
      stop: whether it is asked to stop.
      hang: ends it when it makes no progress.
      say: called with lines for a person to read, in the first process alone.
      clock: where its time goes.
    """

    config: Config
    setup: Setup
    directory: RunDirectory
    stop: StopRequest
    hang: HangTimeout
    say: Callable[[str], None]
    clock: Clock = dataclasses.field(default_factory=Clock)

    def point(self, done: int) -> None:
        """Pass a place where the run may stop, so many steps being done.

        All processes pass the same places in the same order.

        Raises:
          InterruptedRunError: when it shall stop here.
        """
        self.hang.progress()
        number = self.stop.requested()
        if number:
            raise InterruptedRunError(
                f"Stopped by {number.name} after step {done} of {self.config.train.steps}. The "
                "same command goes on from there.",
                number,
            )
