"""A safetensors file in a bucket, of which only the bytes that are wanted are fetched.

The format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxmoo.files.buckets import BucketPath

__all__ = ["RemoteTensor", "remote_tensors"]

# What the safetensors library allows as well.
_LONGEST_HEADER = 100_000_000
_NUMPY = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Bytes at the beginning that are fetched in one request; most headers fit in.
_FIRST = 2**17


class _Rows(NamedTuple):
    """Rows that were fetched last, of any tensor of a file."""

    name: str
    first: int
    values: np.ndarray

    def covers(self, first: int, last: int) -> bool:
        return self.first <= first and last <= self.first + len(self.values)


class RemoteTensor:
    """A tensor with the methods of safetensors' slices.

    Of a slice, the rows from its first to its last are fetched, in one request, and kept until
    other ones are: devices that hold columns of the same rows share them.

    Args:
      file: the safetensors file.
      name: the tensor's name in there.
      start: where its bytes begin.
      dtype: as the file names it.
      shape: its shape.
      held: holds the rows that were fetched last, of all tensors of the file.
    """

    def __init__(
        self,
        file: BucketPath,
        name: str,
        start: int,
        dtype: str,
        shape: tuple[int, ...],
        held: list[_Rows],
    ) -> None:
        self._file, self._name, self._start = file, name, start
        self._dtype, self._shape, self._held = dtype, shape, held

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """Return the dtype as the file names it."""
        return self._dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        if not self._shape:
            return self._rows(0, 1)[0]
        first, last, _ = index[0].indices(self._shape[0])
        held = next(iter(self._held), None)
        if held is None or held.name != self._name or not held.covers(first, last):
            self._held.clear()
            held = _Rows(self._name, first, self._rows(first, last))
            self._held.append(held)
        return held.values[first - held.first : last - held.first][(slice(None), *index[1:])]

    def _rows(self, first: int, last: int) -> np.ndarray:
        dtype = _NUMPY[self._dtype]
        row = math.prod(self._shape[1:]) * dtype.itemsize
        found = self._file.read_range(self._start + first * row, self._start + last * row)
        if len(found) != (last - first) * row:
            raise OSError(f"{self._file} ended early: {len(found)} bytes of {(last - first) * row}")
        return np.frombuffer(found, dtype).reshape(last - first, *self._shape[1:])


def remote_tensors(file: BucketPath) -> Iterator[tuple[str, RemoteTensor]]:
    """Yield the tensors of a file by name; only its header is read.

    Args:
      file: the safetensors file.

    Raises:
      ValueError: it is not one, or its header does not describe the file's bytes.
      OSError: it cannot be read.
    """
    size = file.stat().st_size
    head = file.read_range(0, min(_FIRST, size))
    if len(head) < 8:
        raise ValueError(f"{size} bytes are no safetensors file")
    length = int.from_bytes(head[:8], "little")
    if length > min(_LONGEST_HEADER, size - 8):
        raise ValueError(f"its header would have {length:,} bytes")
    if len(head) < 8 + length:
        head += file.read_range(len(head), 8 + length)
    header: Any = json.loads(head[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    ends = [8 + length]
    header.pop("__metadata__", None)
    entries = {name: _entry(name, entry) for name, entry in header.items()}
    for start, end, *_ in sorted(entries.values()):
        if start + 8 + length != ends[-1]:
            raise ValueError("its tensors overlap or leave gaps")
        ends.append(end + 8 + length)
    if ends[-1] != size:
        raise ValueError(f"it has {size:,} bytes, its header tells of {ends[-1]:,}")
    held: list[_Rows] = []
    for name, (start, _, dtype, shape) in entries.items():
        yield name, RemoteTensor(file, name, start + 8 + length, dtype, shape, held)


def _entry(name: str, entry: Any) -> tuple[int, int, str, tuple[int, ...]]:
    """Where a tensor begins and ends, its dtype and shape."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, end]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"what it says of {name} is damaged: {error!r}") from None
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"what it says of {name} is damaged")
    size = math.prod(shape) * _NUMPY[dtype].itemsize if dtype in _NUMPY else end - start
    if end - start != size:
        raise ValueError(f"{name} has {end - start} bytes, its shape takes {size}")
    return start, end, dtype, tuple(shape)
