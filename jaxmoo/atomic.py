"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["replace_text"]


def replace_text(file: Path, text: str) -> None:
    """Replace a file's contents at once, on disk when this returns.

    A reader, or who comes after a crash, sees the old or the new, never a part.

    Args:
      file: its directory is there.
      text: the new contents.

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
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)
