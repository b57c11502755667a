"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxmoo.files.buckets import is_bucket

__all__ = ["replace_text", "replacing"]


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """Replace a file's contents at once by what is written here, on disk when this ends.

    A reader, or who comes after a crash, sees the old or the new, never a part.

    Args:
      file: its directory is there.

    Yields:
      Where to write the new contents.

    Raises:
      OSError: they cannot be written; the old contents stay.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = Path(folder) / "a.bin"
      ...     with replacing(file) as stream:
      ...         _ = stream.write(b"new")
      ...     print(file.read_bytes())
      b'new'
    """
    if is_bucket(file):  # an object is replaced at once, or not at all
        whole = io.BytesIO()
        yield whole
        file.write_bytes(whole.getvalue())
        return
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def replace_text(file: Path, text: str) -> None:
    """Replace a file's contents at once, as :func:`replacing` does.

    Args:
      file: its directory is there.
      text: the new contents, written in UTF-8.

    Raises:
      OSError: it cannot be written; the old contents stay.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = Path(folder) / "a.txt"
      ...     replace_text(file, "one")
      ...     replace_text(file, "two")
      ...     print(file.read_text(), len(list(Path(folder).iterdir())))
      two 1
    """
    with replacing(file) as stream:
        stream.write(text.encode())
