"""Directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxmoo.errors import CheckpointError

__all__ = ["check_target", "new_directory"]


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

    Args:
      path: the directory to make; may exist if empty.

    Yields:
      A temporary directory beside it to write into; removed on an error.

    Raises:
      CheckpointError: when ``path`` is not empty, or the disk is full or read-only.
    """
    check_target(path)
    temporary = path.absolute().parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        check_target(path)
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
