"""Gram matrices on TPUs: one kernel per array, which reads it once.

XLA makes a product of 8 rows by 8 one of matrices: it reads both factors, and fills 8 of 128 or 256
columns of the matrix unit. The vector unit does the few products of every pair of rows while the
next block of the array arrives.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxmoo.kernels.contraction import cross_grams

__all__ = ["tpu_gram"]

_SUBLANES, _LANES = 16, 128  # a register of 16-bit numbers
_BLOCK = 2**21  # entries of a block: two of them fit beside each other in a core's memory
_MOST_OBJECTIVES = 8  # whose pairs' sums fit in registers
_AT_ONCE = 8  # registers of every objective between two rounds of the loop
_FEW = 2**14  # entries of a row that are too few for a kernel


def tpu_gram(x: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Gram matrix of every section of one array, accumulated in float32.

    Args:
      x: per-objective gradients [K, S, ...]. The kernel is for matrices of 16 bits per number whose
        sections fill registers, and for K up to 8; everything else is left to the compiler.
      interpret: compute what the kernel does without a TPU.

    Returns:
      float32 [S, K, K], or float64 for float64 gradients. A non-finite row makes its own row and
      column non-finite.

    Example:
      >>> x = jnp.ones((2, 1, 1024, 128), jnp.bfloat16)
      >>> tpu_gram(x, interpret=True).tolist()
      [[[131072.0, 131072.0], [131072.0, 131072.0]]]
    """
    k, sections, *shape = x.shape
    suits = x.dtype.itemsize == 2 and k <= _MOST_OBJECTIVES and math.prod(shape) >= _FEW
    if not suits or len(shape) != 2 or shape[1] % _LANES or shape[0] < _SUBLANES:
        return cross_grams(x, x)
    rows, columns = shape
    height = max(1, _BLOCK // (k * columns * _SUBLANES)) * _SUBLANES
    height = min(height, -(-rows // _SUBLANES) * _SUBLANES)
    return pl.pallas_call(
        functools.partial(_kernel, rows),
        grid=(sections, pl.cdiv(rows, height)),
        in_specs=[pl.BlockSpec((k, 1, height, columns), lambda s, i: (0, s, i, 0))],
        out_specs=pl.BlockSpec((1, k, k), lambda s, i: (s, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((sections, k, k), jnp.float32),
        interpret=interpret,
    )(x)


def _kernel(rows: int, x_ref: Any, out_ref: Any) -> None:
    k, _, height, columns = x_ref.shape
    pairs = [(i, j) for i in range(k) for j in range(i + 1)]
    block = pl.program_id(1)
    width = math.gcd(columns, _AT_ONCE * _LANES)
    across = columns // width

    def add_some(turn: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top = pl.multiple_of(turn // across * _SUBLANES, _SUBLANES)
        for at in range(0, width, _LANES):
            left = pl.multiple_of(turn % across * width + at, _LANES)
            sums = add(top, left, sums)
        return sums

    def add(top: jax.Array, left: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        place = (0, pl.ds(top, _SUBLANES), pl.ds(left, _LANES))
        row = block * height + top + lax.broadcasted_iota(jnp.int32, (_SUBLANES, _LANES), 0)

        def of(i: int) -> jax.Array:
            values = x_ref[(i, *place)].astype(jnp.float32)
            return values if rows % height == 0 else jnp.where(row < rows, values, 0.0)

        x = [of(i) for i in range(k)]
        halves = [v.reshape(2, _SUBLANES // 2, _LANES) for v in x]
        return tuple(
            total + (halves[i][0] * halves[j][0] + halves[i][1] * halves[j][1])
            for total, (i, j) in zip(sums, pairs, strict=True)
        )

    zeros = (jnp.zeros((_SUBLANES // 2, _LANES), jnp.float32),) * len(pairs)
    sums = lax.fori_loop(0, height // _SUBLANES * across, add_some, zeros)
    row, column = (lax.broadcasted_iota(jnp.int32, (k, k), axis) for axis in (0, 1))
    found = jnp.zeros((k, k), jnp.float32)
    for total, (i, j) in zip(sums, pairs, strict=True):
        mine = ((row == i) & (column == j)) | ((row == j) & (column == i))
        found = jnp.where(mine, jnp.sum(total), found)

    @pl.when(block == 0)
    def _() -> None:
        out_ref[0] = found

    @pl.when(block > 0)
    def _() -> None:
        out_ref[0] += found
