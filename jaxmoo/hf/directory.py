"""Directories that appear whole or not at all, whichever processes write them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmoo.errors import CheckpointError

__all__ = ["agree", "check_target", "first_process", "new_directory"]


def check_target(path: Path) -> None:
    """Refuse to write where something already is.

    Args:
      path: the directory that is to be made.

    Raises:
      CheckpointError: when it is a file or holds anything.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(
            f"{path} already exists and is not an empty directory; nothing was written. Choose "
            "another path or remove it yourself."
        )


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Make a directory whose contents appear at once, when the block has ended without error.

    Where there are several processes, all of them must enter, and see the same files; the first
    one makes and renames the directory.

    Args:
      path: the directory to make; may exist if empty.

    Yields:
      A temporary directory beside it to write into; removed on an error.

    Raises:
      CheckpointError: when ``path`` is not empty, or the disk is full or read-only; in all
        processes if in the first.
    """
    number = os.getpid()
    if jax.process_count() > 1:
        number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    temporary = path.absolute().parent / f".{path.name}.{number}.tmp"

    def make() -> None:
        check_target(path)
        temporary.mkdir(parents=True)

    def rename() -> None:
        check_target(path)
        os.replace(temporary, path)

    try:
        first_process(make)
        yield temporary
        first_process(rename)
    except OSError as error:
        advice = "Check the path and its permissions."
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "Free some space, or choose a path on a larger disk."
        raise CheckpointError(
            f"{path} could not be written: {error}. Nothing was left behind. {advice}"
        ) from error
    finally:
        if jax.process_index() == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def first_process(action: Callable[[], None]) -> None:
    """Let the first process do something, while the others wait for it.

    Raises:
      CheckpointError: in the others, when it failed.
      Exception: in the first, what it failed with.
    """
    failure = None
    if jax.process_index() == 0:
        try:
            action()
        except (CheckpointError, OSError) as error:
            failure = error
    agree(failure)


def agree(failure: Exception | None) -> None:
    """Raise this process's failure; else, that the first process has failed, if so."""
    succeeded = failure is None
    if jax.process_count() > 1:
        succeeded = bool(multihost_utils.broadcast_one_to_all(np.int32(succeeded)))
    if failure is not None:
        raise failure
    if not succeeded:
        raise CheckpointError("the first process could not write the model; see its message")
