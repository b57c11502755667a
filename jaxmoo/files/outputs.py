"""Paths as people type them, and whether anything can be written there."""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path
from typing import cast

from jaxmoo.errors import ConfigError
from jaxmoo.files.buckets import BucketPath, is_bucket, scheme_of

__all__ = ["PROBE", "check_writable", "typed_path"]

# How what other processes write to a bucket begins while they look whether they may.
PROBE = ".probe-"


def typed_path(text: str | os.PathLike[str]) -> Path:
    """Return the path that a person means, on this machine or in a bucket.

    This is the one place where a text becomes a path: what begins with ``s3://``, ``gs://``,
    ``hf://`` or ``memory://`` is a :class:`~jaxmoo.files.buckets.BucketPath`, which has those
    methods of a `Path` that make sense in buckets. A shell leaves the ``~`` of ``--output=~/a``.

    Raises:
      ConfigError: it begins with the home of somebody who is not known here, or with the name of a
        store that is not supported.

    Example:
      >>> typed_path("~/runs") == Path.home() / "runs"
      True
      >>> typed_path("memory://bucket/runs") / "a"
      BucketPath('memory://bucket/runs/a')
    """
    if is_bucket(text):
        return cast("Path", text)
    if scheme_of(str(text)) is not None:
        return cast("Path", BucketPath(str(text)))
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
    if is_bucket(directory):
        _check_bucket(directory, setting)
        return
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


def _check_bucket(directory: Path, setting: str) -> None:
    if isinstance(directory, BucketPath) and directory.scheme == "hf":
        raise ConfigError(
            f"{setting}: {directory}: the Hugging Face hub keeps every change for ever, so runs do "
            "not write there. Choose another place, and upload the export."
        )
    probe = directory / f"{PROBE}{uuid.uuid4().hex}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{setting}: nothing can be written to {directory}: {error.strerror}. Choose another "
            "place."
        ) from error
