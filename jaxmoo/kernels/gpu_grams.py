"""Gram matrices on NVIDIA GPUs: all arrays of a block in one kernel that reads each of them once.

XLA makes a product of 8 rows by 8 a general one for matrices, at a quarter of the memory's speed,
and one more kernel per array to add up its parts. Here a program takes every n-th tile of one
array's columns and adds up their products on the tensor cores, whose smallest matrix has 16 rows:
of fewer objectives, several tiles are laid on top of each other, and only the products of each with
itself are kept.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxmoo.dtypes import at_least_float32
from jaxmoo.kernels.contraction import cross_grams

__all__ = ["grams_in_one_kernel"]

_ROWS = 16  # of the smallest product
_ENTRIES = 8192  # of a tile
_PROGRAMS = 1056  # eight for each of an H100's 132 multiprocessors
_FEWEST_TILES = 4  # of a program
_FEW = 2**16  # entries of a row that are too few for a kernel
_MOST_ARRAYS = 16  # in one kernel, whose text has a branch for each


class _Share(NamedTuple):
    """The programs that one array has; each of its sections has equally many."""

    columns: int  # of a section
    first: int  # number of the first program
    sections: int
    programs: int  # of a section


def grams_in_one_kernel(arrays: Sequence[jax.Array], *, interpret: bool = False) -> list[jax.Array]:
    """Gram matrix of every section of every array, accumulated in float32.

    Args:
      arrays: per-objective gradients, each [K, S, ...]. The kernel is for those of 16 bits per
        number and many columns; the others are left to the compiler.
      interpret: compute what the kernel does without a GPU.

    Returns:
      Gram matrices float32 [S, K, K] of each array. A non-finite row makes its own row and column
      non-finite.

    Example:
      >>> x = jnp.array([[[1.0, 2.0]], [[0.0, 3.0]]], jnp.bfloat16)
      >>> grams_in_one_kernel([x], interpret=True)[0].tolist()
      [[[5.0, 6.0], [6.0, 9.0]]]
    """
    large = [i for i, x in enumerate(arrays) if x.dtype.itemsize == 2 and _columns(x) > _FEW]
    found: dict[int, jax.Array] = {}
    for at in range(0, len(large), _MOST_ARRAYS):
        mine = large[at : at + _MOST_ARRAYS]
        found |= zip(mine, _in_kernel([arrays[i] for i in mine], interpret), strict=True)
    return [found[i] if i in found else _by_compiler(x) for i, x in enumerate(arrays)]


def _columns(x: jax.Array) -> int:
    return math.prod(x.shape[2:])


def _by_compiler(x: jax.Array) -> jax.Array:
    # A kernel would prescribe how the gradients of vectors lie in memory, and the compiler would
    # transpose the activations that they are sums of. In float32 its products are faster.
    if _columns(x) > _FEW:
        return cross_grams(x, x)
    x = x.reshape(*x.shape[:2], -1).astype(at_least_float32(x.dtype))
    return jnp.sum(x[:, None] * x[None, :], axis=-1).transpose(2, 0, 1)


def _in_kernel(arrays: Sequence[jax.Array], interpret: bool) -> list[jax.Array]:
    k = arrays[0].shape[0]
    height = pl.next_power_of_2(k)
    stacked = max(1, _ROWS // height)
    tile = _Tile(k, height, stacked, max(_ROWS, _ENTRIES // (height * stacked)))
    shares = _shares(arrays, tile.width * stacked)
    programs = shares[-1].first + shares[-1].sections * shares[-1].programs
    rows = height * stacked
    options: dict[str, Any] = {"interpret": True}
    if not interpret:
        options = {"compiler_params": triton.CompilerParams(num_warps=4, num_stages=4)}
    parts = pl.pallas_call(
        functools.partial(_kernel, shares, tile),
        grid=(programs,),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(arrays),
        out_specs=pl.BlockSpec((1, rows, rows), lambda i: (i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((programs, rows, rows), jnp.float32),
        **options,
    )(*(x.reshape(k, -1) for x in arrays))
    # Only the products of tiles with themselves.
    parts = functools.reduce(
        operator.add, (parts[:, i : i + k, i : i + k] for i in range(0, rows, height))
    )
    return [
        parts[s.first : s.first + s.sections * s.programs]
        .reshape(s.sections, s.programs, k, k)
        .sum(1)
        for s in shares
    ]


class _Tile(NamedTuple):
    objectives: int
    height: int  # objectives, rounded up to a power of two
    stacked: int  # tiles on top of each other
    width: int


def _shares(arrays: Sequence[jax.Array], step: int) -> list[_Share]:
    """Divide programs by size."""
    total = sum(x.size for x in arrays)
    shares: list[_Share] = []
    first = 0
    for x in arrays:
        sections, columns = x.shape[1], _columns(x)
        most = math.ceil(columns / step / _FEWEST_TILES)
        programs = min(math.ceil(_PROGRAMS * x.size / total / sections), most)
        shares.append(_Share(columns, first, sections, programs))
        first += sections * programs
    return shares


def _kernel(shares: Sequence[_Share], tile: _Tile, *refs: Any) -> None:
    *arrays, out = refs
    program = pl.program_id(0)
    shape = (tile.height * tile.stacked, tile.width)
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    objective = row % tile.height
    place = (row // tile.height) * tile.width + lax.broadcasted_iota(jnp.int32, shape, 1)
    step = tile.width * tile.stacked
    for x, share in zip(arrays, shares, strict=True):
        mine = program - share.first

        @pl.when((mine >= 0) & (mine < share.sections * share.programs))
        def _(x: Any = x, share: _Share = share, mine: jax.Array = mine) -> None:
            start = (mine // share.programs) * share.columns

            def add(turn: jax.Array, total: jax.Array) -> jax.Array:
                column = (turn * share.programs + mine % share.programs) * step + place
                there = (column < share.columns) & (objective < tile.objectives)
                rows = triton.load(x.at[objective, start + column], mask=there, other=0.0)
                return total + lax.dot_general(
                    rows, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
                )

            rounds = math.ceil(share.columns / step / share.programs)
            zeros = jnp.zeros((shape[0], shape[0]), jnp.float32)
            out[0] = lax.fori_loop(0, rounds, add, zeros)
