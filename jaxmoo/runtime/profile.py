"""A profile of a few training steps, for TensorBoard or Perfetto."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

__all__ = ["ProfileWindow"]


class ProfileWindow:
    """Records what devices and host do from one step to another.

    Args:
      directory: where the profile is written (JAX's format, read by TensorBoard's profile plugin).
      first: the first step in it, counted from 1; None records nothing.
      count: steps in it.
    """

    def __init__(self, directory: Path, first: int | None, count: int) -> None:
        self._directory = directory
        self._first, self._end = first, None if first is None else first + count
        self._open = False

    def before(self, step: int, finish: Callable[[], None]) -> None:
        """Begin or end the recording, if the step that comes next says so.

        Args:
          step: the number of the step that comes next.
          finish: waits until the steps sent so far are done.
        """
        if step == self._first:
            finish()
            jax.profiler.start_trace(str(self._directory))
            self._open = True
        elif step == self._end:
            self.close(finish)

    def close(self, finish: Callable[[], None]) -> None:
        """End the recording where the run ends within it."""
        if self._open:
            finish()
            jax.profiler.stop_trace()
            self._open = False
