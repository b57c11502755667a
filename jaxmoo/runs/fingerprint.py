"""A digest of a model's parameters, computed where they lie."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from jaxmoo.models import Decoder, logical_paths, named_leaves
from jaxmoo.models.paths import stacked_axes

__all__ = ["fingerprint"]


def fingerprint(
    params: Decoder | nnx.State, everywhere: Sharding | None = None, *, dtype: Any = None
) -> str:
    """Digest of all parameters by name, whatever the segments and devices they lie in.

    It tells models apart that differ by chance or training. It is no protection against forgery.

    Args:
      params: the decoder, or a part of its state.
      everywhere: a sharding of all its devices that shards nothing; needed where these belong to
        several processes, all of which call together.
      dtype: dtype that the parameters are taken to have; by default each its own.

    Returns:
      16 hexadecimal digits.
    """
    leaves = named_leaves(params if isinstance(params, nnx.State) else nnx.state(params))
    stacked = tuple(stacked_axes(path) for path, _ in leaves)
    dtypes = tuple(jnp.dtype(dtype or x.dtype) for _, x in leaves)
    checksums = _all_checksums(dtypes, stacked, everywhere)
    found = jax.device_get(checksums([x for _, x in leaves]))
    lines = [
        f"{name} {dtype.name} {number}"
        for (path, x), dtype, numbers in zip(leaves, dtypes, found, strict=True)
        for name, number in zip(logical_paths(path, x.shape), np.ravel(numbers), strict=True)
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


@functools.cache
def _all_checksums(
    dtypes: tuple[Any, ...], stacked: tuple[int, ...], everywhere: Sharding | None
) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """One program for all models alike."""

    def checksums(arrays: list[jax.Array]) -> list[jax.Array]:
        return [_checksums(x.astype(d), s) for x, d, s in zip(arrays, dtypes, stacked, strict=True)]

    return jax.jit(checksums, out_shardings=everywhere)


def _checksums(x: Any, stacked: int) -> jax.Array:
    """A sum of mixed bits per parameter of a stack; integers wrap around, so order is no matter."""
    # Of 64 bits it makes two numbers, along another axis.
    kind = jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32
    x = jax.lax.bitcast_convert_type(x, kind)
    bits, axes = x.astype(jnp.uint32), tuple(range(stacked, x.ndim))
    place = jnp.zeros((), jnp.uint32)
    for axis in axes:
        iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = place * jnp.uint32(x.shape[axis]) + iota
    mixed = bits + place * jnp.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x45D9F3B)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x45D9F3B)
    return (mixed ^ (mixed >> 16)).sum(axes, dtype=jnp.uint32)
