"""A `Decoder` becomes a Hugging Face directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxmoo.errors import CheckpointError
from jaxmoo.hf.directory import check_target, new_directory
from jaxmoo.hf.load import load_config, progress, read_json
from jaxmoo.hf.names import hf_tensor
from jaxmoo.hf.weights import DTYPES, INDEX_FILE, WEIGHTS_FILE, Weights
from jaxmoo.models.decoder import Decoder
from jaxmoo.models.paths import logical_paths, named_leaves

__all__ = ["Tensor", "save_model", "write_weights"]

MAX_SHARD_BYTES = 5 * 10**9

# What else makes up a model directory; copied as it is where the source has it.
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
)


def save_model(
    model: Decoder,
    path: Path,
    *,
    source: Path,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model as a Hugging Face directory that loads without jaxmoo.

    Nothing appears under ``path`` before everything is written.

    Args:
      model: the decoder; its parameters may lie on several devices of this process.
      path: the directory to make; it may exist if it is empty.
      source: the directory the model was loaded from: config, tokenizer, generation config and
        chat template are taken from it unchanged.
      dtype: dtype of all tensors in the files (its name is the one change made to the config).
        By default each tensor keeps the dtype it has in ``source``, so that an unchanged model is
        saved with identical bytes.
      max_shard_bytes: weights are split into several files and an index beyond this size.

    Raises:
      CheckpointError: when ``path`` is not empty, ``source`` is not a directory of this model, or
        a value does not fit the dtype of the files.
    """
    path, source = Path(path), Path(source)
    check_target(path)
    if load_config(source) != model.config:
        raise CheckpointError(
            f"the model does not have the sizes in {source / 'config.json'}; source must be the "
            "directory it was loaded from"
        )
    config = (source / "config.json").read_text("utf-8")
    if dtype is not None:
        config = _with_dtype(read_json(source / "config.json"), dtype)
    stored = Weights(source)
    tensors = [
        _model_tensor(leaf, layer, logical, stored, dtype)
        for leaf_path, leaf in named_leaves(nnx.state(model))
        for layer, logical in enumerate(logical_paths(leaf_path, leaf.shape))
    ]
    with new_directory(path) as directory:
        write_weights(directory, tensors, max_shard_bytes=max_shard_bytes)
        (directory / "config.json").write_text(config, "utf-8")
        for name in _COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)


def _with_dtype(config: dict[str, Any], dtype: Any) -> str:
    name = jnp.dtype(dtype).name
    if name not in DTYPES.values():
        raise CheckpointError(f"dtype must be one of {', '.join(DTYPES.values())}, got {name}")
    # transformers 5 calls it dtype, transformers 4 torch_dtype.
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return json.dumps(config | dict.fromkeys(keys, name), indent=2) + "\n"


class Tensor(NamedTuple):
    """A tensor to be written.

    Attributes:
      name: its name in the file.
      nbytes: its size there.
      read: makes its value; called once, when its file is written.
    """

    name: str
    nbytes: int
    read: Callable[[], np.ndarray]


def write_weights(
    directory: Path, tensors: Sequence[Tensor], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write tensors as ``model.safetensors``, or as numbered files and an index.

    Only one file's tensors are in memory at a time.

    Args:
      directory: where to write.
      tensors: what to write, in this order.
      max_shard_bytes: size beyond which a new file is begun.
    """
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    total = sum(tensor.nbytes for tensor in tensors)
    weight_map = {}
    with progress(total, "Writing weights") as bar:
        for number, shard in enumerate(shards, 1):
            name = WEIGHTS_FILE
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            values = {}
            for tensor in shard:
                values[tensor.name] = np.ascontiguousarray(tensor.read())
                weight_map[tensor.name] = name
                bar.update(tensor.nbytes)
            # Readers of the format want to know which framework's conventions the names follow.
            save_file(values, directory / name, metadata={"format": "pt"})
            # The library makes files that only their owner can read.
            (directory / name).chmod(directory.stat().st_mode & 0o666)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _model_tensor(leaf: jax.Array, layer: int, logical: str, stored: Weights, dtype: Any) -> Tensor:
    """The tensor that holds a parameter, or one layer of a stack of parameters."""
    name, transposed = hf_tensor(logical)
    storage = jnp.dtype(stored.dtype(name) if dtype is None else dtype)
    stacked = logical.startswith("layers.")
    size = leaf.size // leaf.shape[0] if stacked else leaf.size

    def read() -> np.ndarray:
        value = np.asarray(_layer(leaf, layer) if stacked else leaf)
        with np.errstate(over="ignore"):
            converted = value.astype(storage)
        if np.isinf(converted).any() and not np.isinf(value).any():
            raise CheckpointError(
                f"{name} has values beyond the range of {storage.name}; save with dtype bfloat16 "
                "or float32"
            )
        return converted.T if transposed else converted

    return Tensor(name, size * storage.itemsize, read)


@jax.jit
def _layer(stack: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
