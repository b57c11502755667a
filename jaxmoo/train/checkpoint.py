"""Checkpoints of a run: what they hold, and how they are read back."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxmoo.errors import CheckpointError

__all__ = ["Checkpoints"]


class Checkpoints:
    """The checkpoints of one run, in ``directory/STEP``; the newest few are kept.

    A checkpoint appears under its final name only when it is complete. Writing goes on in the
    background; leaving the context, or saving again, waits for it.

    Args:
      directory: where checkpoints are kept; made when it does not exist.
      keep: how many of the newest to keep.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        self._directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Write a pytree of arrays as the checkpoint of a step, unless it exists already."""
        if self.latest() != step:
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def wait(self) -> None:
        """Wait until everything saved is on disk."""
        self._manager.wait_until_finished()

    def restore(self, step: int, like: Any) -> Any:
        """Read a checkpoint straight into place.

        Args:
          step: which one.
          like: pytree of arrays with the shapes, dtypes and shardings to restore to.

        Raises:
          CheckpointError: the checkpoint cannot be read, or does not fit ``like``.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint {self._directory / str(step)} cannot be restored: {error}\n"
                "If it is damaged, remove that directory; the run resumes from an older one."
            ) from error
