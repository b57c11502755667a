"""Arrays as bytes, or in a file that is read as far as it is looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

__all__ = ["map_arrays", "packed", "unpacked", "write_arrays"]

_DTYPES = {"BOOL": "?", "U8": "<u1", "U16": "<u2", "I32": "<i4", "I64": "<i8"}


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray], about: str = "") -> None:
    """Write arrays to a file of the safetensors format.

    Args:
      file: a new file.
      arrays: bool, uint8, uint16, int32 or int64, by name.
      about: a text to be kept with them.

    Raises:
      OSError: they cannot be written.
    """
    file.write_bytes(packed(arrays, about))


def map_arrays(file: Path) -> tuple[dict[str, np.ndarray], str]:
    """Open the arrays of a file, which memory holds only as far as they are looked at.

    Args:
      file: what :func:`write_arrays` wrote; nothing else may change it from here on.

    Returns:
      The arrays, read-only, and the text beside them.

    Raises:
      OSError, ValueError: it cannot be read, or is no such file.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_arrays(Path(folder) / "a", {"odd": np.array([1, 3], np.int32)}, "numbers")
      ...     arrays, about = map_arrays(Path(folder) / "a")
      ...     print(arrays["odd"].tolist(), about)
      [1, 3] numbers
    """
    # As plain arrays: a `memmap` takes ten times as long to cut.
    return _cut(np.asarray(np.memmap(file, np.uint8, mode="r")))


def packed(arrays: Mapping[str, np.ndarray], about: str = "") -> bytes:
    """Return what :func:`write_arrays` writes.

    Args:
      arrays: as there.
      about: as there.

    Example:
      >>> arrays, about = unpacked(packed({"odd": np.array([1, 3], np.int32)}, "numbers"))
      >>> arrays["odd"].tolist(), about
      ([1, 3], 'numbers')
    """
    return safetensors.numpy.save(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, {"about": about}
    )


def unpacked(content: bytes) -> tuple[dict[str, np.ndarray], str]:
    """Return the arrays, read-only, and the text that :func:`packed` has made bytes of."""
    return _cut(np.frombuffer(content, np.uint8))


def _cut(content: np.ndarray) -> tuple[dict[str, np.ndarray], str]:
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    about = header.pop("__metadata__")["about"]
    arrays = {}
    for name, one in header.items():
        first, last = (start + at for at in one["data_offsets"])
        arrays[name] = content[first:last].view(_DTYPES[one["dtype"]]).reshape(one["shape"])
    return arrays, about
