"""A `Decoder` becomes a Hugging Face directory."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from jaxmoo.errors import CheckpointError, ConfigError
from jaxmoo.files.at_hand import copy_file
from jaxmoo.files.buckets import is_bucket
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf.card import ModelCard
from jaxmoo.hf.directory import agree, check_target, first_process, new_directory
from jaxmoo.hf.generation import generation_config
from jaxmoo.hf.load import load_config, progress, read_json
from jaxmoo.hf.names import HFTensor, constant_tensors, hf_tensor
from jaxmoo.hf.weights import DTYPES, INDEX_FILE, WEIGHTS_FILE, Weights
from jaxmoo.models.adapted_kernel import AdaptedKernel
from jaxmoo.models.decoder import Decoder
from jaxmoo.models.lora import quantized_kernels
from jaxmoo.models.paths import logical_paths, named_leaves, stacked_axes

__all__ = [
    "Tensor",
    "check_space",
    "copy_companions",
    "model_tensors",
    "save_model",
    "state_tensors",
    "write_directory",
    "write_file",
    "write_weights",
]

MAX_SHARD_BYTES = 5 * 10**9

# What else makes up a model directory; copied as it is where the source has it.
_COPIED = ("generation_config.json", "LICENSE")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def save_model(
    model: Decoder,
    path: Path,
    *,
    source: Path,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    card: ModelCard | None = None,
    chat_template: str | None = None,
    stop: Sequence[int] = (),
    tokenizer: Path | None = None,
    merge_onto: str | None = None,
) -> None:
    """Write a model as a Hugging Face directory that loads without jaxmoo.

    Nothing appears under ``path`` before everything is written. Tensors are gathered from the
    devices, and written, one at a time.

    Args:
      model: the decoder; its parameters may be sharded in any way. Where they are spread over
        several processes, all of these must call, and see the same files; the first one writes.
      path: the directory to make; it may exist if it is empty.
      source: the directory the model was loaded from: config, tokenizer, generation config and
        chat template are taken from it unchanged.
      dtype: dtype of all tensors in the files (its name is the one change made to the config).
        By default each tensor keeps the dtype it has in ``source``, so that an unchanged model is
        saved with identical bytes; a mapping gives each tensor's dtype by its name, for a
        ``source`` without weights.
      max_shard_bytes: weights are split into several files and an index beyond this size.
      card: what the README.md in the directory shall say; by default there is none.
      chat_template: the chat template, where it is not the one in ``source``.
      stop: tokens that end a generated text beside those that do in ``source``.
      tokenizer: the directory with the tokenizer, where it is not ``source``.
      merge_onto: for a model with a quantised base, whose adapters are merged one matrix at a time,
        as they are written: into those of ``source`` ("base"), or into what the quantised ones
        stand for ("quantized"), which is also what None does.

    Raises:
      ConfigError: ``merge_onto`` is something else.
      CheckpointError: when ``path`` is not empty, ``source`` is not a directory of this model,
        the disk is too small, or a value does not fit the dtype of the files.
    """
    if merge_onto not in ("base", "quantized", None):
        raise ConfigError(f"merge_onto must be 'base', 'quantized' or None, found {merge_onto!r}.")
    path, source = typed_path(path), typed_path(source)
    first_process(lambda: check_target(path))
    if load_config(source) != model.config:
        raise CheckpointError(
            f"the model does not have the sizes in {source / 'config.json'}; source must be the "
            "directory it was loaded from"
        )
    config = (source / "config.json").read_text("utf-8")
    if dtype is None:
        dtype_of = Weights(source).dtype
    elif isinstance(dtype, Mapping):
        dtype_of = dtype.__getitem__
    else:
        config = _with_dtype(read_json(source / "config.json"), dtype)
        dtype_of = lambda _: dtype  # noqa: E731
    generation = generation_config(source, stop)
    original = Weights(source) if merge_onto == "base" else None
    tensors = model_tensors(model, dtype_of, original)

    def write(directory: Path, tensors: Sequence[Tensor]) -> None:
        write_weights(directory, tensors, max_shard_bytes=max_shard_bytes)
        (directory / "config.json").write_text(config, "utf-8")
        copy_companions(source, directory, tokenizer=tokenizer)
        if generation is not None:
            (directory / "generation_config.json").write_text(generation, "utf-8")
        if chat_template is not None:
            (directory / "chat_template.jinja").write_text(chat_template, "utf-8")
        if card is not None:
            card.write(directory)

    write_directory(path, tensors, write)


def write_directory(
    path: Path, tensors: Sequence[Tensor], write: Callable[[Path, Sequence[Tensor]], None]
) -> None:
    """Make a directory of tensors that may be spread over several processes.

    Args:
      path: the directory to make; it may exist if it is empty. It appears when all is written.
      tensors: what to write.
      write: writes the tensors it is given, and what belongs to them, into the directory it is
        given. Only the first process calls it.

    Raises:
      CheckpointError: when ``path`` is not empty, or something could not be read or written.
    """
    with new_directory(path) as directory:
        if jax.process_count() == 1:
            write(directory, tensors)
        else:
            _write_together(directory, tensors, write)


def _write_together(
    directory: Path, tensors: Sequence[Tensor], write: Callable[[Path, Sequence[Tensor]], None]
) -> None:
    """Let the first process write, while the others help it to gather every tensor.

    A process that fails still takes part in the rest, or the others would wait for it for ever.
    """
    # In an order that does not depend on how they are split into files.
    tensors = sorted(tensors, key=_file_order)
    pending = collections.deque(tensors)

    def counted(tensor: Tensor) -> Tensor:
        def read() -> np.ndarray:
            pending.popleft()
            return tensor.read()

        return tensor._replace(read=read)

    failure: Exception | None = None
    try:
        if jax.process_index() == 0:
            write(directory, [counted(t) for t in tensors])
    except (CheckpointError, OSError) as error:
        failure = error
    while pending:
        try:
            pending.popleft().read()
        except CheckpointError as error:
            failure = failure or error
    agree(failure)


def copy_companions(source: Path, directory: Path, *, tokenizer: Path | None = None) -> None:
    """Copy what else makes up a model directory: tokenizer, generation config, chat template."""
    origins = dict.fromkeys(_COPIED, source) | dict.fromkeys(_TOKENIZER, tokenizer or source)
    for name, origin in origins.items():
        if (origin / name).is_file():
            copy_file(origin / name, directory / name)


def model_tensors(
    model: Decoder, dtype: Callable[[str], Any], original: Weights | None = None
) -> list[Tensor]:
    """List the tensors of a model under their Hugging Face names.

    Args:
      model: the decoder; adapters that it has on a quantised base are merged.
      dtype: gives the dtype of a tensor in the file, by its name.
      original: the matrices that take the place of quantised ones; by default, what these stand
        for.

    Returns:
      The tensors; each is brought to the host, and converted, when it is read. What a family keeps
      beside weights and never changes is among them, where it has a dtype.
    """
    config = model.config
    leaves = named_leaves(nnx.state(model))
    for path, kernel in quantized_kernels(model):
        leaves = [(p, leaf) for p, leaf in leaves if p[: len(path)] != path or p[-1] == "bias"]
        leaves.append(((*path, "kernel"), kernel))
    tensors = _tensors(leaves, dtype, functools.partial(hf_tensor, config=config), original)
    for name, value in constant_tensors(config).items():
        with contextlib.suppress(KeyError):  # not in the files the model came from
            tensors.append(_constant(name, value, jnp.dtype(dtype(name))))
    return tensors


def _constant(name: str, value: float, dtype: np.dtype) -> Tensor:
    return Tensor(name, (), dtype, lambda: np.asarray(value, dtype))


def state_tensors(
    state: nnx.State,
    dtype: Callable[[str], Any],
    tensor_of: Callable[[str], HFTensor] = hf_tensor,
) -> list[Tensor]:
    """List the tensors of a decoder's state, or a part of it; see `model_tensors`.

    Args:
      state: the state.
      dtype: gives the dtype of a tensor in the file, by its name.
      tensor_of: gives the tensor that holds a parameter, by its logical path.
    """
    return _tensors(named_leaves(state), dtype, tensor_of)


def _tensors(
    leaves: Iterable[tuple[tuple[str, ...], Any]],
    dtype: Callable[[str], Any],
    tensor_of: Callable[[str], HFTensor],
    original: Weights | None = None,
) -> list[Tensor]:
    # Of tensors that hold several parameters, one below the other, by their first rows.
    found: dict[str, dict[int, Tensor]] = {}
    for path, leaf in leaves:
        stacks = leaf.shape[: stacked_axes(path)]
        for place, logical in zip(
            np.ndindex(*stacks), logical_paths(path, leaf.shape), strict=True
        ):
            tensor = tensor_of(logical)
            first, _ = tensor.rows or (0, 0)
            part = _state_tensor(leaf, place, tensor, dtype, original)
            found.setdefault(tensor.name, {})[first] = part
    return [_joined([parts[first] for first in sorted(parts)]) for parts in found.values()]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One tensor of the rows of several."""
    if len(parts) == 1:
        return parts[0]
    rows = sum(part.shape[0] for part in parts)
    return parts[0]._replace(
        shape=(rows, *parts[0].shape[1:]),
        read=lambda: np.concatenate([part.read() for part in parts]),
    )


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
      shape: its shape there.
      dtype: its dtype there.
      read: makes its value; called once, when it is written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    directory: Path, tensors: Sequence[Tensor], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write tensors as ``model.safetensors``, or as numbered files and an index.

    Only one tensor is in memory at a time.

    Args:
      directory: where to write.
      tensors: what to write; those of one file are consecutive.
      max_shard_bytes: size beyond which a new file is begun.

    Raises:
      CheckpointError: the disk has no room for them.
    """
    if max_shard_bytes < 1:
        raise CheckpointError(f"the size of a file must be at least 1 byte, got {max_shard_bytes}")
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    total = sum(tensor.nbytes for tensor in tensors)
    check_space(directory, total)
    weight_map = {}
    with progress(total, "Writing weights") as bar:
        for number, shard in enumerate(shards, 1):
            name = WEIGHTS_FILE
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_file(directory / name, shard, bar.update)
            weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def check_space(directory: Path, total: int) -> None:
    """Raise CheckpointError unless so many bytes can be written to a directory."""
    if is_bucket(directory):
        return  # which tells nobody
    free = shutil.disk_usage(directory).free
    if total > free:
        raise CheckpointError(
            f"{directory.parent} has {free:,} bytes of free space, the weights need {total:,}. "
            "Nothing was left behind. Free some space, or choose a path on a larger disk."
        )


def write_file(
    file: Path, tensors: Sequence[Tensor], done: Callable[[int], Any] = lambda _: None
) -> None:
    """Write a safetensors file tensor by tensor, where the library wants all of them at once.

    The format: https://github.com/huggingface/safetensors#format. Order and header are the
    library's own, so that files are the same to the byte.

    Args:
      file: where to write.
      tensors: what to write.
      done: is told of bytes written.
    """
    # Wider types come first, which keeps every tensor aligned.
    tensors = sorted(tensors, key=_file_order)
    # Readers of the format want to know which framework's conventions the names follow.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _SHORT[tensor.dtype.name],
            "shape": tensor.shape,
            "data_offsets": (end, end + tensor.nbytes),
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            # Not named, so that it is gone before the next one is read.
            stream.write(_bytes(tensor.read()))
            done(tensor.nbytes)


def _file_order(tensor: Tensor) -> tuple[int, bytes]:
    return _ORDER.index(tensor.dtype.name), tensor.name.encode()


def _bytes(value: np.ndarray) -> memoryview:
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


_SHORT = {long: short for short, long in DTYPES.items()}
_ORDER = ("float64", "float32", "bfloat16", "float16")


def _state_tensor(
    leaf: jax.Array | AdaptedKernel,
    place: tuple[int, ...],
    tensor: HFTensor,
    dtype: Callable[[str], Any],
    original: Weights | None,
) -> Tensor:
    """The tensor that holds a parameter, or one of a stack: of a layer, and an expert in it."""
    name, transposed, rows = tensor
    storage = jnp.dtype(dtype(name))
    shape = leaf.shape[len(place) :]

    def read() -> np.ndarray:
        # A copy: JAX keeps what it has brought to the host for as long as the array itself lives.
        if isinstance(leaf, AdaptedKernel):
            kernel = None if original is None else original.read(name, _rows(rows)).T
            array = _merged(leaf, place, kernel)
        else:
            array = _tensor(leaf, place, transposed)
        if array.is_fully_addressable:
            value = np.asarray(array)
        else:
            value = multihost_utils.process_allgather(array, tiled=True)
        del array
        with np.errstate(over="ignore"):
            converted = value.astype(storage, copy=False)
        narrower = jnp.finfo(storage).max < jnp.finfo(value.dtype).max
        if narrower and np.isinf(converted).any() and not np.isinf(value).any():
            raise CheckpointError(
                f"{name} has values beyond the range of {storage.name}; save with dtype bfloat16 "
                "or float32"
            )
        return converted

    return Tensor(name, shape[::-1] if transposed else shape, storage, read)


def _rows(rows: tuple[int, int] | None) -> tuple[slice, ...]:
    return () if rows is None else (slice(rows[0], sum(rows)), slice(None))


@jax.jit
def _merged(adapted: AdaptedKernel, place: tuple[jax.Array, ...], kernel: Any) -> jax.Array:
    """One kernel of a stack with what adapters add, in float32 and the layout of the file."""
    if kernel is not None:
        adapted = dataclasses.replace(adapted, kernel=None)
    one = jax.tree.map(lambda x: _within(x, place) if jnp.ndim(x) else x, adapted)
    if kernel is not None:
        one = dataclasses.replace(one, kernel=kernel)
    return dataclasses.replace(one, dtype=jnp.dtype(jnp.float32)).value().T


@functools.partial(jax.jit, static_argnames="transposed")
def _tensor(leaf: jax.Array, place: tuple[jax.Array, ...], transposed: bool) -> jax.Array:
    """A parameter, or one of a stack, in the layout of the file."""
    leaf = _within(leaf, place)
    return leaf.T if transposed else jnp.copy(leaf)


def _within(stack: jax.Array, place: tuple[jax.Array, ...]) -> jax.Array:
    for number in place:
        stack = jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)
    return stack
