"""Paths as people type them, and whether anything can be written there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from jaxmoo.errors import ConfigError

__all__ = ["check_writable", "typed_path"]


def typed_path(text: str | Path) -> Path:
    """Return the path that a person means; a shell leaves the ``~`` of ``--output=~/a`` as it is.

    Raises:
      ConfigError: it begins with the home of somebody who is not known here.

    Example:
      >>> typed_path("~/runs") == Path.home() / "runs"
      True
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{text}: there is no such user here. Give the whole path, or ./{text} for a file of "
            "that name."
        ) from error


def check_writable(directory: Path, setting: str) -> None:
    """Raise unless files can be written to a directory; it is left as it was, also if not there.

    Args:
      directory: where; need not exist.
      setting: what names it, as errors begin.

    Raises:
      ConfigError: it is a file, cannot be made, or takes no files.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     check_writable(Path(folder) / "a" / "b", "output")
      ...     print(list(Path(folder).iterdir()))
      []
    """
    there = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    try:
        if there != directory:
            # In a place of its own: other processes of a run look at the same time.
            parts = [part for part in directory.relative_to(there).parts if part != ".."]
            with tempfile.TemporaryDirectory(dir=there) as place:
                Path(place, *parts).mkdir(parents=True)
            return
        if not directory.is_dir():
            raise ConfigError(f"{setting}: {directory} is a file; name a directory.")
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(
            f"{setting}: nothing can be written to {directory}: {error.strerror}. Choose another "
            "place."
        ) from error
