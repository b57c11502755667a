"""The header of a GGUF file, read with care: a file is taken for hostile."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType

from jaxmoo.errors import CheckpointError, shown

__all__ = ["Fields", "open_gguf"]

_ABSENT: Any = object()


class Fields:
    """What a header says, every value checked when it is asked for.

    A field that is missing is an error, unless it is asked for with a default.

    Args:
      contents: values by name.
      prefix: what all names that are asked for begin with beside what is given.
    """

    def __init__(self, contents: Mapping[str, Any], prefix: str = ""):
        self._contents = contents
        self._prefix = prefix

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._contents

    def under(self, prefix: str) -> Fields:
        """The fields whose names begin so, by the rest of their names."""
        return Fields(self._contents, self._prefix + prefix)

    def require(self, supported: Mapping[str, Any]) -> None:
        """Raise unless fields are absent or have these values."""
        for name, value in supported.items():
            found = self.get(name, value)
            if found != value:
                raise CheckpointError(
                    f"GGUF files with {self._prefix}{name}={shown(found)} cannot be converted "
                    f"(only {value!r})"
                )

    def get(self, name: str, default: Any = _ABSENT) -> Any:
        """A value of any type.

        Raises:
          CheckpointError: there is no such field; this is so of all the methods below.
        """
        name = self._prefix + name
        if name not in self._contents and default is _ABSENT:
            raise CheckpointError(f"the field {name!r} is missing")
        return self._contents.get(name, default)

    def size(self, name: str, default: Any = _ABSENT) -> int:
        """A positive integer."""
        found = self.get(name, default)
        return self._checked(name, found, "a positive integer", _is_integer(found) and found > 0)

    def number(self, name: str, default: Any = _ABSENT) -> float:
        """A finite number."""
        found = self.get(name, default)
        return float(self._checked(name, found, "a finite number", _is_number(found)))

    def flag(self, name: str, default: Any = _ABSENT) -> bool:
        """True or false."""
        found = self.get(name, default)
        return self._checked(name, found, "true or false", isinstance(found, bool))

    def text(self, name: str, default: Any = _ABSENT) -> str:
        """A text."""
        found = self.get(name, default)
        return self._checked(name, found, "a text", isinstance(found, str))

    def texts(self, name: str) -> list[str]:
        """A list of texts, at least one."""
        return self._list(name, "texts", lambda value: isinstance(value, str))

    def integers(self, name: str) -> list[int]:
        """A list of integers, at least one."""
        return self._list(name, "integers", _is_integer)

    def token(self, name: str, tokens: Sequence[str], default: Any = _ABSENT) -> int | None:
        """The number of one of the tokens; the default may be None."""
        found = self.get(name, default)
        if found is None:
            return None
        fits = _is_integer(found) and 0 <= found < len(tokens)
        return self._checked(name, found, f"a token's number, below {len(tokens)}", fits)

    def numbers(self, name: str) -> list[float]:
        """A list of finite numbers, at least one."""
        return [float(x) for x in self._list(name, "finite numbers", _is_number)]

    def _list(self, name: str, kind: str, is_one: Any) -> list[Any]:
        found = self.get(name)
        fits = isinstance(found, list) and bool(found) and all(map(is_one, found))
        return self._checked(name, found, f"a list of {kind}", fits)

    def _checked(self, name: str, found: Any, expected: str, fits: bool) -> Any:
        if not fits:
            raise CheckpointError(
                f"the field {self._prefix + name!r} must be {expected}, found {shown(found)}"
            )
        return found


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def open_gguf(file: Path) -> tuple[Fields, list[Any]]:
    """Open a GGUF file.

    Args:
      file: the file.

    Returns:
      Its fields and its tensors, as the ``gguf`` package describes them; they are mapped, not read.

    Raises:
      CheckpointError: it is no GGUF file, is damaged or of the other byte order, or its tensors
        overlap or do not begin where the format lets them begin.
    """
    try:
        with np.errstate(over="ignore"):  # forged offsets; they are checked below
            reader = _Reader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    # A damaged file fails in any way at all inside the reader.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"it is not a GGUF file, or is damaged: {reason}") from error
    if reader.byte_order != "I":
        raise CheckpointError("its numbers are in the byte order of another kind of machine")
    _check_places(reader)
    return Fields(fields), reader.tensors


class _Reader(GGUFReader):
    """The package's reader, but for two things that let a small file take all memory.

    It takes what lies beyond a file's end for empty, and makes an array of every number of a list.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **more: Any) -> Any:
        found = super()._get(offset, dtype, count, *rest, **more)
        if len(found) != int(count):
            raise ValueError(f"it ends before byte {int(offset) + int(count)}")
        return found

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == GGUFValueType.ARRAY:
            kind = self._get(orig_offs, np.uint32)
            number = self.gguf_scalar_to_np.get(GGUFValueType(kind[0]))
            if number is not None:
                length = self._get(orig_offs + 4, np.uint64)
                values = self._get(orig_offs + 12, number, length[0])
                types = [GGUFValueType.ARRAY, GGUFValueType(kind[0])]
                return 12 + int(values.nbytes), [kind, length, values], [2], types
        return super()._get_field_parts(orig_offs, raw_type)


def _check_places(reader: GGUFReader) -> None:
    """Raise unless every tensor has bytes of its own, from a multiple of the alignment on."""
    tensors = sorted(reader.tensors, key=lambda tensor: tensor.data_offset)
    for tensor in tensors:
        place = tensor.data_offset - reader.data_offset
        if place < 0 or place % int(reader.alignment):
            raise CheckpointError(
                f"tensor {tensor.name!r} begins {place} bytes after the header, which is not a "
                f"multiple of {reader.alignment}: the file is damaged"
            )
    for one, two in itertools.pairwise(tensors):
        if one.data_offset + one.n_bytes > two.data_offset:
            raise CheckpointError(
                f"tensors {one.name!r} and {two.name!r} overlap: the file is damaged"
            )
