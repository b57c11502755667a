"""Files of a bucket on this machine, for libraries that read nothing else."""

from __future__ import annotations

import contextlib
import fnmatch
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxmoo.files.buckets import is_bucket

__all__ = ["at_hand", "copy_file"]

_PART = 2**24


@contextlib.contextmanager
def at_hand(directory: Path, patterns: Sequence[str]) -> Iterator[str]:
    """Give a directory of this machine with files of another one, directly below it.

    Args:
      directory: where they are; on this machine already, it is what is given.
      patterns: which of them, such as ``"*.json"``.

    Yields:
      The directory; of a bucket's files a copy, which is removed when the block ends.

    Raises:
      OSError: a file cannot be fetched.

    Example:
      >>> from jaxmoo.files.outputs import typed_path
      >>> source = typed_path("memory://bucket/at_hand")
      >>> _ = (source / "a.json").write_text("{}"), (source / "b.bin").write_text("")
      >>> with at_hand(source, ["*.json"]) as folder:
      ...     print([file.name for file in Path(folder).iterdir()])
      ['a.json']
    """
    if not is_bucket(directory):
        yield str(directory)
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in directory.iterdir():
            if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in patterns):
                copy_file(file, Path(folder, file.name))
        yield folder


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, a part at a time, between machine and bucket."""
    with source.open("rb") as stream, target.open("wb") as copy:
        while part := stream.read(_PART):
            copy.write(part)
