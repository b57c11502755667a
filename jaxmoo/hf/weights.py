"""The tensors of a Hugging Face directory, read slice by slice.

A checkpoint is treated as hostile: the safetensors library checks every header, an index may name
only files beside itself, and PyTorch's pickles are opened by its restricted reader or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxmoo.errors import CheckpointError
from jaxmoo.files.buckets import BucketPath
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf.remote_weights import remote_tensors

__all__ = ["DTYPES", "INDEX_FILE", "WEIGHTS_FILE", "Weights"]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLE_FILE = "pytorch_model.bin"

# Dtypes by the names used in safetensors headers.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


class Weights:
    """Read access to the tensors of a directory, in one file or several.

    Args:
      directory: holds ``model.safetensors``, or ``model.safetensors.index.json`` and the files
        it names; without those, ``pytorch_model.bin`` or its index, if PyTorch is installed.

    Attributes:
      files: the files that are read.

    Raises:
      CheckpointError: when files are missing, damaged or of another kind.
    """

    def __init__(self, directory: Path):
        self._slices: dict[str, Any] = {}
        found = _files(typed_path(directory))
        self.files = list(found)
        for file, names in found.items():
            slices = _safetensors_slices if file.suffix == ".safetensors" else _pickle_slices
            self._slices.update(slices(file, names))

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

    def dtypes(self) -> dict[str, str]:
        """Dtypes of all tensors, by name; see `dtype`."""
        return {name: self.dtype(name) for name in self.names()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Read a slice of a tensor; only that slice is brought into memory."""
        index = index or tuple(slice(None) for _ in self.shape(name))
        return self._slices[name][index]


def _safetensors_slices(file: Path, names: list[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(file, BucketPath):
        try:
            found: dict[str, Any] = dict(remote_tensors(file))
            yield from ((name, found[name]) for name in names or found)
        # RecursionError: brackets nested by the thousand.
        except (ValueError, KeyError, RecursionError) as error:
            raise _damaged(file, error) from error
        return
    try:
        handle = safe_open(file, framework="numpy")
        for name in names or handle.keys():
            yield name, handle.get_slice(name)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _pickle_slices(file: Path, names: list[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(file, BucketPath):
        raise CheckpointError(f"{file} is a pickle, and not read from a bucket: save safetensors.")
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{file} is a pickle, and unpickling can run any code. It is opened only through "
            "PyTorch's restricted reader: install torch, or save the model as safetensors."
        ) from None
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        chosen = {name: tensors[name] for name in names or tensors}
    # A damaged or forged pickle fails in any way at all inside the reader.
    except Exception as error:
        raise _damaged(file, error) from error
    for name, tensor in chosen.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(f"{file}: {name} is not a dense tensor")
        yield str(name), _TorchSlice(tensor)


class _TorchSlice:
    """A PyTorch tensor with the methods of safetensors' slices."""

    def __init__(self, tensor: Any):
        self._tensor = tensor.detach()

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        name = str(self._tensor.dtype).removeprefix("torch.")
        return next((short for short, long in DTYPES.items() if long == name), name)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        piece = self._tensor[index].contiguous()
        if self.get_dtype() == "BF16":  # unknown to NumPy, and so to PyTorch's .numpy()
            import torch

            return piece.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return piece.numpy()


def _damaged(file: Path, error: Exception) -> CheckpointError:
    reason = str(error).split("\n")[0] or type(error).__name__
    return CheckpointError(
        f"{file} cannot be read: it is damaged, truncated or does not hold what the index says "
        f"({reason}). Fetch or export it again."
    )


def _files(directory: Path) -> dict[Path, list[str]]:
    """Files to read, with the tensors to take from each (none named: all)."""
    for name in (WEIGHTS_FILE, _PICKLE_FILE):
        if (directory / name).is_file():
            return {directory / name: []}
        index = directory / f"{name}.index.json"
        if index.is_file():
            return _indexed(index, Path(name).suffix)
    others = [p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth")]
    raise CheckpointError(
        f"{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}"
        + (f" ({', '.join(sorted(others))} is not read)." if others else ".")
        + " Save the model as safetensors."
    )


def _indexed(index: Path, suffix: str) -> dict[Path, list[str]]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        entries = [(str(name), str(file)) for name, file in weight_map.items()]
    # RecursionError: brackets nested by the thousand.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{index} is not an index of {suffix} files: {error!r}") from error
    files: dict[Path, list[str]] = {}
    for name, file in entries:
        # A null byte would end the name for the system, though not for us.
        if Path(file).name != file or not file.endswith(suffix) or "\0" in file:
            raise CheckpointError(
                f"{index} names {file!r}; expected the name of a {suffix} file beside it"
            )
        files.setdefault(index.parent / file, []).append(name)
    missing = sorted(file.name for file in files if not _is_file(file))
    if missing:
        raise CheckpointError(f"{index} names files that are not there: {', '.join(missing)}")
    return files


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a name longer than the system allows
        return False
