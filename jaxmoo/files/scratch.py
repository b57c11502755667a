"""Where a directory in a bucket has what only works on this machine, and how that gets there."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from jaxmoo.errors import ConfigError
from jaxmoo.files.at_hand import copy_file
from jaxmoo.files.buckets import is_bucket
from jaxmoo.files.digests import files_below

__all__ = ["copy_files", "scratch_of", "send_directory"]

_AT_ONCE = 8


def scratch_of(directory: Path) -> Path:
    """Return the directory of this machine that belongs to one in a bucket.

    It is below ``$JAXMOO_SCRATCH``, by default below the system's directory for temporary files,
    and the same for all processes of this machine and user.

    Args:
      directory: where something is to be written; on this machine already, it is returned.

    Raises:
      ConfigError: the default cannot be made, or is another user's.

    Example:
      >>> scratch_of(Path("runs/a"))
      PosixPath('runs/a')
    """
    if not is_bucket(directory):
        return directory
    place = os.environ.get("JAXMOO_SCRATCH")
    root = Path(place) if place else _own(Path(tempfile.gettempdir(), f"jaxmoo-{os.getuid()}"))
    return root / hashlib.sha256(str(directory).encode()).hexdigest()[:16]


def _own(root: Path) -> Path:
    """Make a directory of this user's alone where others may write, for programs lie in it."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.is_symlink() or root.stat().st_uid != os.getuid():
            raise ConfigError(
                f"{root} belongs to another user. Name a scratch directory of your own in the "
                "environment variable JAXMOO_SCRATCH."
            )
    except OSError as error:
        raise ConfigError(
            f"{root} cannot be made: {error}. Name a scratch directory in the environment variable "
            "JAXMOO_SCRATCH."
        ) from error
    return root


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy files below a directory to another, several at a time.

    Raises:
      OSError: one cannot be read or written.
    """

    def copy(name: str) -> None:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source / name, target / name)

    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(copy, names):
            pass


def send_directory(source: Path, target: Path) -> None:
    """Copy all that lies below a directory of this machine, if there is one, to a bucket.

    Raises:
      OSError: something cannot be read or written.
    """
    if source != target and source.is_dir():
        copy_files(source, target, files_below(source))
