"""Where fetched and converted files are kept, and whether they are what they should be."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import platformdirs

from jaxmoo.errors import DownloadError
from jaxmoo.files.outputs import typed_path

__all__ = ["cache_directory", "check_sha256"]


def cache_directory(cache_dir: Path | None, kind: str) -> Path:
    """Make, if necessary, the directory where fetched and converted files are kept.

    Args:
      cache_dir: used if given; else ``$JAXMOO_CACHE``; else the user's cache directory.
      kind: name of a directory below it.

    Returns:
      The directory.

    Raises:
      DownloadError: when it cannot be made.
    """
    chosen = cache_dir or os.environ.get("JAXMOO_CACHE") or platformdirs.user_cache_dir("jaxmoo")
    directory = typed_path(chosen) / kind
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"the cache directory {directory} cannot be made ({error}). Set the environment "
            "variable JAXMOO_CACHE to a directory that you may write to."
        ) from error
    return directory


def check_sha256(file: Path, sha256: str) -> None:
    """Raise unless a file has a checksum.

    Args:
      file: the file.
      sha256: expected checksum, in hexadecimal.

    Raises:
      DownloadError: it has another one.
    """
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise DownloadError(
            f"{file} ({file.stat().st_size} bytes) has sha256 {found}, expected {sha256}: it is "
            "truncated or another file. Remove it to have it fetched again."
        )
