"""The tensors of a Hugging Face directory: ``.safetensors`` files, read slice by slice.

A checkpoint is treated as hostile: only safetensors files are opened (nothing is unpickled), an
index may name only files beside itself, and the safetensors library checks every header.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxmoo.errors import CheckpointError

__all__ = ["DTYPES", "INDEX_FILE", "WEIGHTS_FILE", "Weights"]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Dtypes by the names used in safetensors headers.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


class Weights:
    """Read access to the tensors of a directory, in one file or several.

    Args:
      directory: holds ``model.safetensors``, or ``model.safetensors.index.json`` and the files
        it names.

    Raises:
      CheckpointError: when files are missing, damaged or not safetensors.
    """

    def __init__(self, directory: Path):
        self._slices: dict[str, Any] = {}
        for file, names in _files(directory).items():
            try:
                handle = safe_open(file, framework="numpy")
                for name in names or handle.keys():
                    self._slices[name] = handle.get_slice(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file} cannot be read: it is damaged, truncated or does not hold what the "
                    f"index says ({error}). Fetch or export it again."
                ) from error

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> str:
        """Dtype of a tensor, named as in NumPy ("bfloat16" included).

        Raises:
          CheckpointError: when it is not a floating point type of at least 16 bits.
        """
        found = self._slices[name].get_dtype()
        if found not in DTYPES:
            raise CheckpointError(
                f"tensor {name} has dtype {found}; supported: {', '.join(DTYPES)}. Quantised "
                "weights must be converted to one of these first."
            )
        return DTYPES[found]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Read a slice of a tensor; only that slice is brought into memory."""
        index = index or tuple(slice(None) for _ in self.shape(name))
        return self._slices[name][index]


def _files(directory: Path) -> dict[Path, list[str]]:
    """Files to read, with the tensors to take from each (none named: all)."""
    if (directory / WEIGHTS_FILE).is_file():
        return {directory / WEIGHTS_FILE: []}
    index = directory / INDEX_FILE
    if not index.is_file():
        others = [p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth")]
        raise CheckpointError(
            f"{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}"
            + (
                f". {', '.join(sorted(others))} is not read, because unpickling can run any code: "
                "save the model as safetensors first."
                if others
                else "."
            )
        )
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        entries = [(str(name), str(file)) for name, file in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files: {error!r}") from error
    files: dict[Path, list[str]] = {}
    for name, file in entries:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names {file!r}; expected the name of a .safetensors file beside it"
            )
        files.setdefault(directory / file, []).append(name)
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        raise CheckpointError(f"{index} names files that are not there: {', '.join(missing)}")
    return files
