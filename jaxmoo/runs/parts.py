"""What each host has written of a checkpoint reaches the first one, where no disk is shared."""

from __future__ import annotations

from pathlib import Path

import jax

from jaxmoo.files.digests import files_below
from jaxmoo.files.scratch import copy_files

__all__ = ["Parts"]


class Parts:
    """Carries parts of checkpoints from the other processes to the first, by way of a bucket.

    Args:
      place: a directory in the bucket that nobody else uses.
    """

    def __init__(self, place: Path) -> None:
        self._place = place

    def send(self, directory: Path) -> None:
        """Send what this process has written, unless it is the first.

        Args:
          directory: where a checkpoint's state is being written on this host.

        Raises:
          OSError: it cannot be read or sent.
        """
        if jax.process_index() > 0:
            target = self._of(directory) / f"process_{jax.process_index()}"
            copy_files(directory, target, files_below(directory))

    def collect(self, directory: Path) -> None:
        """Bring here what all others have sent; called by the first process.

        Args:
          directory: where the checkpoint's state is being written on this host.

        Raises:
          OSError: it cannot be fetched or written.
        """
        for number in range(1, jax.process_count()):
            source = self._of(directory) / f"process_{number}"
            names = files_below(source)
            copy_files(source, directory, names)
            for name in names:
                (source / name).unlink(missing_ok=True)

    def _of(self, directory: Path) -> Path:
        # That of the step has a longer name while it is written.
        return self._place / directory.parent.name.partition(".")[0]
