"""Gram matrices on NVIDIA GPUs: all arrays of a block in one kernel that reads each of them once.

XLA makes a product of 8 rows by 8 a general one for matrices, at a quarter of the memory's speed,
and one more kernel per array to add up its parts. Here a program takes every n-th tile of one
array's columns and adds up their products on the tensor cores, whose smallest matrix has 16 rows:
of fewer objectives, several tiles are laid on top of each other, and only the products of each with
itself are kept. Small arrays, such as the scales of norms, are laid side by side first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxmoo.kernels.contraction import cross_grams

__all__ = ["grams_in_one_kernel"]

_ROWS = 16  # of the smallest product
_TILE_BYTES = 2**14
_PROGRAMS = 1056  # eight for each of an H100's 132 multiprocessors
_FEWEST_TILES = 4  # of a program
_FEW = 2**16  # entries of a row of an array that is laid beside others
_MOST_SECTIONS = 64  # of such an array
_MOST_SHARES = 16  # in one kernel, whose text has a branch for each


class _Share(NamedTuple):
    """The programs that one array has; each of its sections has equally many."""

    array: int  # which of the kernel's
    start: int  # of its rows' entries there
    columns: int  # of a section
    first: int  # number of the first program
    sections: int
    programs: int  # of a section


class _Rows(NamedTuple):
    """Where the entries of one array are found."""

    holder: jax.Array  # [K, n]
    start: int
    sections: int
    columns: int


def grams_in_one_kernel(arrays: Sequence[jax.Array], *, interpret: bool = False) -> list[jax.Array]:
    """Gram matrix of every section of every array in parts, accumulated in float32.

    Args:
      arrays: per-objective gradients, each [K, S, ...]. Of those that are not small, the kernel is
        for 16 bits per number; the others are left to the compiler.
      interpret: compute what the kernel does without a GPU.

    Returns:
      Float32 [S, P, K, K] of each array: over its parts P they add up to the Gram matrices. A
      non-finite row makes its own row and column non-finite.

    Example:
      >>> x = jnp.array([[[1.0, 2.0]], [[0.0, 3.0]]], jnp.bfloat16)
      >>> grams_in_one_kernel([x], interpret=True)[0].sum(1).tolist()
      [[[5.0, 6.0], [6.0, 9.0]]]
    """
    small = [i for i, x in enumerate(arrays) if _is_small(x)]
    large = [i for i, x in enumerate(arrays) if not _is_small(x) and x.dtype.itemsize == 2]
    rows = {i: _Rows(_flat(arrays[i]), 0, *_extent(arrays[i])) for i in large}
    if small:
        # Whose layout in memory the compiler may choose: a kernel of their own would prescribe it,
        # and the activations that they are sums of would be transposed.
        beside = jnp.concatenate([_flat(arrays[i]).astype(jnp.float32) for i in small], axis=1)
        start = 0
        for i in small:
            rows[i] = _Rows(beside, start, *_extent(arrays[i]))
            start += math.prod(_extent(arrays[i]))
    found: dict[int, jax.Array] = {}
    numbers = sorted(rows)
    for at in range(0, len(numbers), _MOST_SHARES):
        mine = numbers[at : at + _MOST_SHARES]
        found |= zip(mine, _in_kernel([rows[i] for i in mine], interpret), strict=True)
    return [found[i] if i in found else cross_grams(x, x)[:, None] for i, x in enumerate(arrays)]


def _extent(x: jax.Array) -> tuple[int, int]:
    """Number of sections, and columns of each."""
    return x.shape[1], math.prod(x.shape[2:])


def _is_small(x: jax.Array) -> bool:
    sections, columns = _extent(x)
    few = sections <= _MOST_SECTIONS and sections * columns <= _FEW
    return few and x.dtype.itemsize <= 4


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def _in_kernel(rows: Sequence[_Rows], interpret: bool) -> list[jax.Array]:
    arrays: list[jax.Array] = []
    for x in rows:
        if not any(x.holder is y for y in arrays):
            arrays.append(x.holder)
    k = arrays[0].shape[0]
    height = pl.next_power_of_2(k)
    tile = _Tile(k, height, max(1, _ROWS // height))
    shares = _shares(rows, arrays, tile)
    programs = shares[-1].first + shares[-1].sections * shares[-1].programs
    options: dict[str, Any] = {"interpret": True}
    if not interpret:
        options = {"compiler_params": triton.CompilerParams(num_warps=4, num_stages=4)}
    parts = pl.pallas_call(
        functools.partial(_kernel, shares, tile),
        grid=(programs,),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(arrays),
        out_specs=pl.BlockSpec((1, height, height), lambda i: (i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((programs, height, height), jnp.float32),
        **options,
    )(*arrays)
    return [
        parts[s.first : s.first + s.sections * s.programs, :k, :k].reshape(s.sections, -1, k, k)
        for s in shares
    ]


class _Tile(NamedTuple):
    objectives: int
    height: int  # objectives, rounded up to a power of two
    stacked: int  # tiles on top of each other

    def width(self, dtype: Any) -> int:
        """Columns of one tile."""
        entries = _TILE_BYTES // jnp.dtype(dtype).itemsize
        return max(_ROWS, entries // (self.height * self.stacked))


def _shares(rows: Sequence[_Rows], arrays: Sequence[jax.Array], tile: _Tile) -> list[_Share]:
    """Divide programs by size."""
    total = sum(x.sections * x.columns for x in rows)
    shares: list[_Share] = []
    first = 0
    for x in rows:
        step = tile.width(x.holder.dtype) * tile.stacked
        most = math.ceil(x.columns / step / _FEWEST_TILES)
        programs = min(math.ceil(_PROGRAMS * x.columns / total), most)
        number = next(i for i, y in enumerate(arrays) if y is x.holder)
        shares.append(_Share(number, x.start, x.columns, first, x.sections, programs))
        first += x.sections * programs
    return shares


def _kernel(shares: Sequence[_Share], tile: _Tile, *refs: Any) -> None:
    *arrays, out = refs
    program = pl.program_id(0)
    side = tile.height * tile.stacked
    for share in shares:
        x, mine = arrays[share.array], program - share.first

        @pl.when((mine >= 0) & (mine < share.sections * share.programs))
        def _(x: Any = x, share: _Share = share, mine: jax.Array = mine) -> None:
            width = tile.width(x.dtype)
            shape, step = (side, width), width * tile.stacked
            row = lax.broadcasted_iota(jnp.int32, shape, 0)
            objective = row % tile.height
            place = (row // tile.height) * width + lax.broadcasted_iota(jnp.int32, shape, 1)
            start = share.start + (mine // share.programs) * share.columns

            def add(turn: jax.Array, total: jax.Array) -> jax.Array:
                column = (turn * share.programs + mine % share.programs) * step + place
                there = (column < share.columns) & (objective < tile.objectives)
                rows = triton.load(x.at[objective, start + column], mask=there, other=0.0)
                return total + lax.dot_general(
                    rows,
                    rows,
                    (((1,), (1,)), ((), ())),
                    precision=lax.Precision.HIGHEST,  # of float32; products of 16 bits are exact
                    preferred_element_type=jnp.float32,
                )

            rounds = math.ceil(share.columns / step / share.programs)
            zeros = jnp.zeros((side, side), jnp.float32)
            total = lax.fori_loop(0, rounds, add, zeros)
            # Only the products of tiles with themselves.
            row, column = (lax.broadcasted_iota(jnp.int32, (side, side), i) for i in (0, 1))
            own = jnp.where(row // tile.height == column // tile.height, total, 0.0)
            tiles = (tile.stacked, tile.height)
            out[0] = own.reshape(*tiles, *tiles).sum(2).sum(0)
