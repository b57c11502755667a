"""A Hugging Face directory becomes a `Decoder`."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from tqdm.auto import tqdm

from jaxmoo.errors import CheckpointError, ConfigError, did_you_mean, shown
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf.directory import read_unchanged
from jaxmoo.hf.names import HFTensor, constant_tensors, hf_tensor
from jaxmoo.hf.weights import Weights
from jaxmoo.kernels.quantized import quantize as quantized
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.decoder import Decoder
from jaxmoo.models.families import FAMILIES
from jaxmoo.models.paths import logical_paths, named_leaves, stacked_axes
from jaxmoo.models.quantization import quantize_base
from jaxmoo.models.quantized_kernel import is_quantized_part

__all__ = [
    "check_tensors",
    "load_config",
    "load_model",
    "progress",
    "read_json",
    "with_dtypes",
]

# Buffers of old checkpoints, computed from the config today.
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
_STRIP = 256  # rows of a matrix that are transposed at a time


def load_config(path: Path) -> DecoderConfig:
    """Read the sizes of the model in a Hugging Face directory.

    Args:
      path: the directory.

    Returns:
      What its ``config.json`` says.

    Raises:
      CheckpointError: when there is no readable ``config.json``, or a token that ends replies,
        there or in ``generation_config.json``, is none of the model's.
      ConfigError: when the architecture is not supported, or a size or number is of another type
        or out of range.
    """
    file = typed_path(path) / "config.json"
    content = read_json(file)
    try:
        config = DecoderConfig.from_hf(content)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    _check_end_tokens(content, config, file)
    generation = typed_path(path) / "generation_config.json"
    if generation.is_file():
        _check_end_tokens(read_json(generation), config, generation)
    return config


def _check_end_tokens(content: dict[str, Any], config: DecoderConfig, file: Path) -> None:
    found = content.get("eos_token_id")
    for token in found if isinstance(found, list) else [found]:
        if token is None and not isinstance(found, list):
            continue
        if (
            isinstance(token, bool)
            or not isinstance(token, int)
            or not (0 <= token < config.vocab_size)
        ):
            raise CheckpointError(
                f"{file}: eos_token_id must be a token's number, or a list of them, from 0 to "
                f"{config.vocab_size - 1}, found {shown(found)}"
            )


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      CheckpointError: when the file is missing or holds anything else.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    # RecursionError: brackets nested by the thousand.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return content


def load_model(
    path: Path,
    *,
    segments: tuple[int, ...] = (0,),
    dtype: Any = jnp.float32,
    param_dtype: Any | None = jnp.float32,
    remat: str = "full",
    attention: str = "auto",
    platform: str | None = None,
    shardings: Any = None,
    quantize: str | None = None,
) -> Decoder:
    """Load a model with its weights.

    Every tensor is checked by name and shape before the first one is read. Each device receives
    only its own slices, and only those are read from the files, one layer of one parameter at a
    time: beyond the parameters themselves, the host never holds more than twice the largest
    tensor, or one projection of all of a layer's experts.

    Args:
      path: a Hugging Face directory; see `resolve_source`.
      segments: see `Decoder`.
      dtype: see `Decoder`.
      param_dtype: see `Decoder`; the files' values are converted to it. None keeps the dtype
        that each parameter has in the files; where the layers of a stack differ, one that holds
        them all exactly.
      remat: see `Decoder`.
      attention: see `Decoder`.
      platform: see `Decoder`.
      shardings: a pytree of `jax.sharding.Sharding` matching the model's NNX state, or a function
        that makes one from the abstract state. By default everything goes to JAX's default
        device.
      quantize: holds the kernels of layers in few bits; see
        :func:`jaxmoo.models.quantization.quantize_base`. The files' own values are quantised, on
        the host, one layer of one kernel at a time; nothing else of them goes to a device.

    Returns:
      The model.

    Raises:
      CheckpointError: when files are missing or damaged, or tensors are missing, left over or of
        another shape; all of them are named at once.
      ConfigError: when the architecture is not supported, or cannot be quantised so.
    """
    path = typed_path(path)
    config = load_config(path)
    model = Decoder.abstract(
        config,
        segments=segments,
        dtype=dtype,
        param_dtype=jnp.float32 if param_dtype is None else param_dtype,
        remat=remat,
        attention=attention,
        platform=platform,
    )
    weights = Weights(path)
    graphdef, state = nnx.split(model)
    _check(weights, state, config, path)
    if param_dtype is None:
        state = with_dtypes(state, weights.dtype, config)
    if quantize is not None:
        model = nnx.merge(graphdef, state)
        quantize_base(model, quantize)
        graphdef, state = nnx.split(model)
    if callable(shardings):
        shardings = shardings(state)
    leaves, treedef = jax.tree.flatten(state)
    placements = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    if len(placements) != len(leaves):
        raise CheckpointError(
            f"shardings has {len(placements)} leaves, the model's state {len(leaves)}"
        )

    def read() -> list[jax.Array]:
        with progress(sum(x.size * x.dtype.itemsize for x in leaves), "Loading weights") as bar:
            return [
                array
                for kernel, parts in itertools.groupby(
                    zip(named_leaves(state), placements, strict=True), _parameter_of
                )
                for array in _read_parameter(weights, config, kernel, list(parts), bar.update)
            ]

    arrays = read_unchanged(read, path)
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, arrays))


def progress(total: int, description: str) -> tqdm:
    """Make a progress bar in bytes; on a terminal, if the work takes more than a moment."""
    return tqdm(
        total=total,
        desc=description,
        unit="B",
        unit_scale=True,
        delay=2,
        leave=False,
        disable=None,  # only on a terminal
    )


def with_dtypes(
    state: nnx.State, dtype_of: Callable[[str], Any], config: DecoderConfig
) -> nnx.State:
    """Give the abstract state of a `Decoder` other dtypes.

    Args:
      state: the state.
      dtype_of: gives a tensor's dtype by its Hugging Face name; a stack of layers gets one that
        holds those of all its layers exactly.
      config: of the model.

    Returns:
      The state, its leaves `jax.ShapeDtypeStruct`.

    Raises:
      CheckpointError: on float64 where JAX would make it float32.
    """
    leaves = []
    for path, leaf in named_leaves(state):
        dtypes = [
            dtype_of(hf_tensor(name, config).name) for name in logical_paths(path, leaf.shape)
        ]
        dtype = functools.reduce(jnp.promote_types, dtypes)
        if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
            raise CheckpointError(
                f"{'.'.join(path)} is float64; set the environment variable JAX_ENABLE_X64=1 to "
                "keep it so"
            )
        leaves.append(jax.ShapeDtypeStruct(leaf.shape, dtype))
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def check_tensors(
    found: Mapping[str, tuple[int, ...]], state: nnx.State, config: DecoderConfig, path: Path
) -> None:
    """Raise unless tensors are exactly those of a model.

    Args:
      found: their shapes by Hugging Face name.
      state: abstract state of the model.
      config: its sizes.
      path: file or directory with all of that.

    Raises:
      CheckpointError: some are missing, left over or of another shape; it names all of them.
    """
    if config.num_hidden_layers > len(found):
        raise CheckpointError(
            f"the config in {path} says num_hidden_layers={config.num_hidden_layers}, but its "
            f"weights are only {len(found)} tensors"
        )
    expected: dict[str, tuple[int, ...]] = {}
    for leaf_path, leaf in named_leaves(state):
        shape = leaf.shape[stacked_axes(leaf_path) :]
        for logical in logical_paths(leaf_path, leaf.shape):
            tensor = hf_tensor(logical, config)
            stored = shape[::-1] if tensor.transposed else shape
            if tensor.rows is not None:  # one of several, below those before it
                stored = (sum(tensor.rows), *stored[1:])
                stored = max(stored, expected.get(tensor.name, stored))
            expected[tensor.name] = stored
    constant = constant_tensors(config)
    found = {name: shape for name, shape in found.items() if name not in constant}
    missing = [name for name in expected if name not in found]
    extra = sorted(set(found) - set(expected))
    for start, what in FAMILIES[config.family].names.others.items():
        if any(name.startswith(start) for name in extra):
            raise CheckpointError(
                f"the weights in {path} have a {what} ({start}*), which is not supported. Save "
                "the text model alone with transformers, as the documentation of models shows, "
                "and use that."
            )
    misshapen = [
        f"{name}: expected shape {list(shape)}, found {list(found[name])}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        *_listed(misshapen, str),
        *_listed(missing, lambda name: f"missing: {name}"),
        *_listed(
            extra, lambda name: f"not part of this architecture: {name}{_near(name, missing)}"
        ),
    ]
    if problems:
        raise CheckpointError(
            f"the weights in {path} do not fit its config:\n  " + "\n  ".join(problems)
        )


def _check(weights: Weights, state: nnx.State, config: DecoderConfig, path: Path) -> None:
    """Raise unless the files hold exactly the tensors of the model."""
    found = {name: weights.shape(name) for name in weights.names() if not _IGNORED.search(name)}
    # Some tied models ship a copy of the embedding as their head.
    head, table = (hf_tensor(f"{x}.embedding", config).name for x in ("lm_head", "embed_tokens"))
    copied = config.tie_word_embeddings and found.pop(head, None) is not None
    for name, value in constant_tensors(config).items():
        if name in found:
            _check_constant(weights, name, value)
    check_tensors(found, state, config, path)
    if copied and not _equal(weights, head, table):
        raise CheckpointError(
            f"{path}: config.json says tie_word_embeddings, but {head} differs from "
            f"{table}. Set tie_word_embeddings to false or drop the tensor."
        )
    for name in found:
        weights.dtype(name)


def _check_constant(weights: Weights, name: str, value: float) -> None:
    """Raise unless a tensor holds a number, rounded to a dtype that it has or may have had."""
    own = jnp.dtype(weights.dtype(name))
    rounded = [np.asarray(value, x).astype(own) for x in (own, jnp.bfloat16, np.float16)]
    if weights.shape(name) != () or np.asarray(weights.read(name)) not in rounded:
        raise CheckpointError(f"{name} must be {value}; other values are not supported")


def _listed(items: list[str], describe: Callable[[str], str], most: int = 20) -> list[str]:
    """Descriptions of the first items, and how many there are beyond those."""
    more = [f"... and {len(items) - most} more"] if len(items) > most else []
    return [describe(item) for item in items[:most]] + more


def _near(name: str, missing: list[str]) -> str:
    """Which missing tensor a left-over one may be, misnamed."""
    if len(missing) > 1000:  # nothing matches, and comparing all with all takes long
        return ""
    hint = did_you_mean(name, missing)
    return hint and f".{hint}"


def _equal(weights: Weights, a: str, b: str) -> bool:
    if weights.shape(a) != weights.shape(b):
        return False
    rows = weights.shape(a)[0]
    bands = [(slice(i, min(i + 1024, rows)), slice(None)) for i in range(0, rows, 1024)]
    return all(np.array_equal(weights.read(a, band), weights.read(b, band)) for band in bands)


# A leaf with its path, and its placement.
_Placed = tuple[tuple[tuple[str, ...], jax.ShapeDtypeStruct], Sharding | None]


def _parameter_of(placed: _Placed) -> tuple[str, ...]:
    """Path of the parameter that a leaf is, or is part of."""
    path = placed[0][0]
    return path[:-1] if is_quantized_part(path) else path


def _read_parameter(
    weights: Weights,
    config: DecoderConfig,
    path: tuple[str, ...],
    parts: Sequence[_Placed],
    done: Callable[[int], Any],
) -> list[jax.Array]:
    """Read a parameter, or the stack of its layers, into place; ``done`` is told of bytes.

    Its parts are codes and scales, if it is quantised.
    """
    leaves, placements = [leaf for (_, leaf), _ in parts], [placement for _, placement in parts]
    tensors = [hf_tensor(name, config) for name in logical_paths(path, leaves[0].shape)]
    if path[0] != "layers":
        done(leaves[0].size * leaves[0].dtype.itemsize)
        return [_place(weights, tensors, leaves[0].shape, leaves[0].dtype, placements[0])]
    pieces = [_sharding_of_a_layer(placement) for placement in placements]
    stacks = [_zeros(x.shape, x.dtype, y)() for x, y in zip(leaves, placements, strict=True)]
    each = len(tensors) // leaves[0].shape[0]  # several where there are experts
    for layer in range(leaves[0].shape[0]):
        mine = tensors[layer * each : (layer + 1) * each]
        if len(parts) == 1:
            leaf = leaves[0]
            values = [_place(weights, mine, leaf.shape[1:], leaf.dtype, pieces[0])]
        else:
            values = _place_quantized(weights, mine, leaves, pieces)
        # Waiting keeps the host from reading ahead of the device, with all layers in its memory.
        stacks = [
            _set_layer(placement)(stack, value, layer).block_until_ready()
            for placement, stack, value in zip(placements, stacks, values, strict=True)
        ]
        done(sum(value.nbytes for value in values))
    return stacks


def _place_quantized(
    weights: Weights,
    tensors: Sequence[HFTensor],
    stacks: Sequence[jax.ShapeDtypeStruct],
    placements: Sequence[Any],
) -> list[jax.Array]:
    """Put codes and scales of a kernel, or of those of all experts, on their devices.

    They are made of what these hold of it.
    """
    *experts, blocks, rows, width = stacks[0].shape[1:]
    kind, inputs = ("nf4", 2 * rows) if stacks[0].dtype == jnp.uint8 else ("int8", rows)

    @functools.cache
    def piece(
        tensor: HFTensor, first: int, end: int, columns: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        index = (slice(*columns), slice(first * inputs, end * inputs))
        return quantized(weights.read(tensor.name, _within(tensor, index)).T, kind)

    def one(tensor: HFTensor, part: int, index: Any) -> np.ndarray:
        first, end, _ = index[0].indices(blocks)
        found = piece(tensor, first, end, index[-1].indices(width)[:2])[part]
        return found[:, index[1]] if part == 0 else found

    def read(part: int, index: Any) -> np.ndarray:
        if not experts:
            return one(tensors[0], part, index)
        chosen, *rest = index
        return np.stack([one(tensor, part, rest) for tensor in tensors[chosen]])

    whole = tuple(slice(None) for _ in range(len(experts) + 3))
    return [
        jnp.asarray(read(part, whole))
        if placement is None
        else jax.make_array_from_callback(stack.shape[1:], placement, functools.partial(read, part))
        for part, (stack, placement) in enumerate(zip(stacks, placements, strict=True))
    ]


def _place(
    weights: Weights,
    tensors: Sequence[HFTensor],
    shape: tuple[int, ...],
    dtype: Any,
    placement: Any,
) -> jax.Array:
    """Put a tensor, or a stack of those of all experts, on its devices, slice by slice."""

    def one(tensor: HFTensor, index: Any) -> np.ndarray:
        if tensor.transposed:
            return _transposed(weights.read(tensor.name, _within(tensor, index[::-1])), dtype)
        return weights.read(tensor.name, index).astype(dtype, copy=False)

    def read(index: Any) -> np.ndarray:  # a slice per axis
        if len(shape) < 3:
            return one(tensors[0], index)
        experts, *rest = index
        return np.stack([one(tensor, tuple(rest)) for tensor in tensors[experts]])

    if placement is None:
        return jnp.asarray(read(tuple(slice(None) for _ in shape)))
    return jax.make_array_from_callback(shape, placement, read)


def _within(tensor: HFTensor, index: Any) -> Any:
    """Move slices of a parameter in the layout of the file to where it begins in its tensor."""
    if tensor.rows is None:
        return index
    first, count = tensor.rows
    start, stop, _ = index[0].indices(count)
    return (slice(first + start, first + stop), *index[1:])


def _transposed(matrix: np.ndarray, dtype: Any) -> np.ndarray:
    """Copy a matrix with its axes swapped, in strips that stay in a core's cache."""
    copy = np.empty(matrix.shape[::-1], dtype)
    for start in range(0, len(matrix), _STRIP):
        strip = slice(start, start + _STRIP)
        copy[:, strip] = matrix[strip].T
    return copy


def _sharding_of_a_layer(stack: Sharding | None) -> Sharding | None:
    """How one layer of a stack lies on the devices."""
    if stack is None or isinstance(stack, SingleDeviceSharding):
        return stack
    if isinstance(stack, NamedSharding):
        # Where devices hold different layers, each layer goes to all of them for a moment.
        return NamedSharding(stack.mesh, P(*stack.spec[1:]))
    raise CheckpointError(f"shardings must be NamedSharding or of a single device, got {stack!r}")


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: Any, placement: Sharding | None) -> Callable[[], Any]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=placement)


@functools.cache
def _set_layer(placement: Sharding | None) -> Callable[..., jax.Array]:
    """A program that replaces one layer of a stack, in place."""

    def set_layer(stack: jax.Array, value: jax.Array, layer: jax.Array) -> jax.Array:
        # 16 bits as integers: the CPU backend copies floats of that size one by one.
        dtype = jnp.uint16 if stack.dtype.itemsize == 2 else stack.dtype
        bits = (lax.bitcast_convert_type(x, dtype) for x in (stack, value))
        replaced = lax.dynamic_update_index_in_dim(*bits, layer, 0)
        return lax.bitcast_convert_type(replaced, stack.dtype)

    return jax.jit(set_layer, donate_argnums=0, out_shardings=placement)
