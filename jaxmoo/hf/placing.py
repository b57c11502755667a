"""Tensors of files, as parameters on their devices: each device gets its own slices alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxmoo.errors import CheckpointError
from jaxmoo.hf.names import HFTensor, hf_tensor
from jaxmoo.hf.weights import Weights
from jaxmoo.kernels.quantized import quantize
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.paths import logical_paths
from jaxmoo.models.quantized_kernel import is_quantized_part

__all__ = ["parameter_of", "read_parameter"]

_STRIP = 256  # rows of a matrix that are transposed at a time

# A leaf with its path, and its placement.
Placed = tuple[tuple[tuple[str, ...], jax.ShapeDtypeStruct], Sharding | None]


def parameter_of(placed: Placed) -> tuple[str, ...]:
    """Path of the parameter that a leaf is, or is part of."""
    path = placed[0][0]
    return path[:-1] if is_quantized_part(path) else path


def read_parameter(
    weights: Weights,
    config: DecoderConfig,
    path: tuple[str, ...],
    parts: Sequence[Placed],
    done: Callable[[int], Any],
) -> list[jax.Array]:
    """Read a parameter, or the stack of its layers, onto its devices.

    Args:
      weights: the files.
      config: of the model.
      path: of the parameter in the model's state.
      parts: its one leaf, or its codes and scales, if it is to be quantised.
      done: is told how many bytes are there, again and again.

    Returns:
      An array for each part.

    Raises:
      CheckpointError: files are damaged, or a sharding is of a kind that has no layers.
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
        return quantize(weights.read(tensor.name, _within(tensor, index)).T, kind)

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
