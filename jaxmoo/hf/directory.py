"""Directories that appear whole or not at all, whichever processes write them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from filelock import FileLock, Timeout
from jax.experimental import multihost_utils

from jaxmoo.errors import CheckpointError, ConfigError, JaxmooError
from jaxmoo.files.buckets import BucketPath, is_bucket
from jaxmoo.files.digests import DIGESTS, UNFINISHED, read_checked, read_digests, write_digests
from jaxmoo.files.outputs import check_writable

__all__ = [
    "agree",
    "check_target",
    "first_process",
    "is_unfinished",
    "new_directory",
    "read_unchanged",
    "remove_directory",
    "written_files",
]

T = TypeVar("T")


def check_target(path: Path) -> None:
    """Refuse to write where something already is.

    Args:
      path: the directory that is to be made.

    Raises:
      CheckpointError: when it is a file or holds anything, or nothing can be written there.
    """
    if path.exists() and not is_unfinished(path) and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(
            f"{path} already exists and is not an empty directory; nothing was written. Choose "
            "another path or remove it yourself."
        )
    try:
        check_writable(path.absolute().parent, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Make a directory whose contents appear at once, when the block has ended without error.

    With them appear the digests of its files (`jaxmoo.files.digests`).

    Where there are several processes, all of them must enter, and see the same files; the first
    one makes and renames the directory.

    Args:
      path: the directory to make; may exist if empty.

    Yields:
      A temporary directory beside it to write into; removed on an error. In a bucket the directory
      itself, where the digests come last: one without them is not whole, and cleared by the next
      that is made there.

    Raises:
      CheckpointError: when ``path`` is not empty, or the disk is full or read-only; in all
        processes if in the first.
    """
    if is_bucket(path):
        with _new_in_bucket(path):
            yield path
        return
    number = os.getpid()
    if jax.process_count() > 1:
        number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    temporary = path.absolute().parent / f".{path.name}.{number}.tmp"
    lock = FileLock(temporary.with_suffix(".lock"))

    def make() -> None:
        check_target(path)
        _clear_abandoned(path)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(NotImplementedError, OSError):  # a file system without locks
            lock.acquire(timeout=0)
        temporary.mkdir()

    def rename() -> None:
        write_digests(temporary)
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
            _remove(temporary)
            lock.release()
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink()


@contextlib.contextmanager
def _new_in_bucket(path: Path) -> Iterator[None]:
    def begin() -> None:
        check_target(path)
        remove_directory(path)
        (path / UNFINISHED).write_bytes(b"")

    def finish() -> None:
        write_digests(path)
        (path / UNFINISHED).unlink()

    try:
        first_process(begin)
        yield
        first_process(finish)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written: {error}. What is there of it is cleared by the next "
            "that is written there."
        ) from error


def is_unfinished(path: Path) -> bool:
    """Whether a directory in a bucket was begun by `new_directory`, and not finished."""
    return is_bucket(path) and (path / UNFINISHED).exists()


def remove_directory(path: Path) -> None:
    """Remove a directory with all that is in it, if it is there."""
    if not isinstance(path, BucketPath):
        shutil.rmtree(path, ignore_errors=True)
        return
    (path / DIGESTS).unlink(missing_ok=True)  # without them it is not whole, from then on
    path.rmtree()


def _remove(directory: Path) -> None:
    """Remove a directory into which a library's threads may write for a while after an error."""
    until = time.monotonic() + 10
    while directory.exists() and time.monotonic() < until:
        shutil.rmtree(directory, ignore_errors=True)


def _clear_abandoned(path: Path) -> None:
    """Remove what killed processes began to write for a directory; those at work hold a lock."""
    parent = path.absolute().parent
    pattern = re.compile(rf"(\.{re.escape(path.name)}\.\d+)\.(tmp|lock)")
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    for stem in {found[1] for name in names if (found := pattern.fullmatch(name))}:
        lock = FileLock(parent / f"{stem}.lock", timeout=0)
        with contextlib.suppress(Timeout, NotImplementedError, OSError), lock:
            shutil.rmtree(parent / f"{stem}.tmp", ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)


def written_files(path: Path) -> dict[str, str]:
    """Return the digests of what was written to a directory that `new_directory` made.

    Without the README.md, which is there for people to edit. Empty where there are no digests.

    Raises:
      CheckpointError: the digests are damaged.
    """
    try:
        found = read_digests(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. Make or copy {path} anew; or remove {DIGESTS}, if you trust the other files."
        ) from None
    files = {} if found is None else found.files
    return {name: digest for name, digest in files.items() if name != "README.md"}


def read_unchanged(read: Callable[[], T], path: Path) -> T:
    """Read a model's directory; raise where its files are not what was written, if that is known.

    Several processes call together.

    Args:
      read: reads it.
      path: the directory.

    Raises:
      CheckpointError: names the directory and the files.
    """
    return read_checked(
        read,
        path,
        written_files(path),
        says=f"{path} cannot be read",
        advice=f"If it is damaged, make or copy it anew. If you have changed it on purpose, remove "
        f"{path / DIGESTS}.",
    )


def first_process(action: Callable[[], T], doing: str = "write the model") -> T | None:
    """Let the first process do something, while the others wait for it.

    Args:
      action: what it does.
      doing: what that is, for the error of the others.

    Returns:
      What the action returns, in the first process; None in the others.

    Raises:
      CheckpointError: in the others, when it failed.
      Exception: in the first, what it failed with.
    """
    found = failure = None
    if jax.process_index() == 0:
        try:
            found = action()
        except (JaxmooError, OSError) as error:
            failure = error
    agree(failure, doing)
    return found


def agree(failure: Exception | None, doing: str = "write the model") -> None:
    """Raise this process's failure; else, that the first process has failed, if so."""
    succeeded = failure is None
    if jax.process_count() > 1:
        succeeded = bool(multihost_utils.broadcast_one_to_all(np.int32(succeeded)))
    if failure is not None:
        raise failure
    if not succeeded:
        raise CheckpointError(f"the first process could not {doing}; see its message")
