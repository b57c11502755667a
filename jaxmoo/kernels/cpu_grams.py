"""Gram matrices on XLA's CPU backend, by all cores.

The backend multiplies a wide, flat matrix by its transpose on one core, after copying it. Cut into
slices that stay in a core's cache it copies nothing through memory, and loops over slices run at
the same time, provided that no two of them share a temporary buffer. The compiler lets them share,
because it takes loops to run one after the other. So the loops here have no temporaries: every
intermediate result is an element of the loop's carry, and all carries are read in the end, by a
condition that never holds.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmoo.dtypes import at_least_float32
from jaxmoo.kernels.contraction import cross_grams
from jaxmoo.runtime.cores import available_cores
from jaxmoo.sharding import varying

__all__ = ["grams_by_slices", "grams_of_many"]

# Entries of one slice, K rows of float32: it stays in a core's cache. Smaller slices cost more to
# start than to multiply, and the backend would run loops over them one after the other.
_ENTRIES = 98_304
_FEWEST_COLUMNS = 512
_LOOPS_PER_CORE = 8  # as many as the backend leaves to one thread
_MOST_LOOPS = 64
_FEWEST_SLICES = 4  # of a loop, if there are so many
# Entries up to which an array is worth no loops where there may be hundreds: they take ten times as
# long to compile as a product.
_FEW = 2**20


class _Carry(NamedTuple):
    unfinished: jax.Array  # bool
    section: jax.Array  # of the next slice
    place: jax.Array  # of the next slice in its section
    rows: jax.Array  # [K, columns], the last slice
    product: jax.Array  # [K, K], its Gram matrix
    total: jax.Array  # [S, K, K]


def grams_of_many(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Gram matrix of every section of every array; only large arrays are cut into slices.

    Args:
      arrays: per-objective gradients, each [K, S, ...].

    Returns:
      Gram matrices [S, K, K] of each array.

    Example:
      >>> grams_of_many([jnp.ones((2, 1, 100))])[0].tolist()
      [[[100.0, 100.0], [100.0, 100.0]]]
    """
    large = [i for i, x in enumerate(arrays) if x.size > _FEW]
    sliced = dict(zip(large, grams_by_slices([arrays[i] for i in large]), strict=True))
    return [sliced[i] if i in sliced else cross_grams(x, x) for i, x in enumerate(arrays)]


@jax.custom_jvp
@jax.custom_batching.sequential_vmap
def grams_by_slices(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Gram matrix of every section of every array, accumulated in float32 or better.

    Args:
      arrays: per-objective gradients, each [K, S, ...].

    Returns:
      Gram matrices [S, K, K] of each array.

    Example:
      >>> grams_by_slices([jnp.ones((2, 1, 10_000))])[0].tolist()
      [[[10000.0, 10000.0], [10000.0, 10000.0]]]
    """
    arrays = [x.reshape(*x.shape[:2], -1) for x in arrays]
    slices = [x.shape[1] * _per_section(x)[0] for x in arrays]
    share = max(_FEWEST_SLICES, math.ceil(sum(slices) / _most_loops()))
    ends = []  # of each array's loops
    for x, count in zip(arrays, slices, strict=True):
        loops = math.ceil(count / share)
        bounds = [count * i // loops for i in range(loops + 1)] if loops else []
        ends.append([_loop(x, *pair) for pair in itertools.pairwise(bounds)])
    never = functools.reduce(operator.or_, (_never(end) for each in ends for end in each), False)
    grams = []
    for x, each in zip(arrays, ends, strict=True):
        rest = x[:, :, math.prod(_per_section(x)) :]
        total = sum((end.total for end in each), cross_grams(rest, rest))
        grams.append(jnp.where(never, 0, total))
    return grams


@grams_by_slices.defjvp
def _differential(primals, tangents):
    (arrays,), (changes,) = primals, tangents
    halves = [cross_grams(x, dx) for x, dx in zip(arrays, changes, strict=True)]
    return grams_by_slices(arrays), [half + half.mT for half in halves]


def _per_section(x: jax.Array) -> tuple[int, int]:
    """Number of slices and columns of each; few columns remain."""
    k, _, n = x.shape
    if n < _FEWEST_COLUMNS:
        return 0, 0
    count = math.ceil(n / max(_FEWEST_COLUMNS, _ENTRIES // k))
    return count, n // count // 16 * 16


def _most_loops() -> int:
    return min(_LOOPS_PER_CORE * available_cores(), _MOST_LOOPS)


def _loop(x: jax.Array, start: int, stop: int) -> _Carry:
    """Add up the products of slices ``start`` to ``stop``, counted section by section."""
    k, sections, _ = x.shape
    per_section, columns = _per_section(x)
    dtype, zero, one = x.dtype, np.uint32(0), np.uint32(1)
    wide = at_least_float32(dtype)
    if dtype.itemsize == 2:
        # As integers, or the backend converts the whole array to float32 before the loop. It
        # still makes one copy, in 16 bits.
        x = lax.bitcast_convert_type(x, jnp.uint16)

    def step(carry: _Carry) -> _Carry:
        corner = (zero, carry.section, carry.place * np.uint32(columns))
        rows = lax.dynamic_slice(x, corner, (k, 1, columns))[:, 0]
        if dtype.itemsize == 2:
            rows = lax.bitcast_convert_type(rows, dtype)
        rows = rows.astype(wide)
        product = jnp.matmul(rows, rows.T, precision=lax.Precision.HIGHEST)
        corner = (carry.section, zero, zero)
        total = lax.dynamic_slice(carry.total, corner, (1, k, k)) + product
        total = lax.dynamic_update_slice(carry.total, total, corner)
        # Sums of squares are never negative, but so the counters change after their last use. Else
        # the compiler would make copies of them, in temporaries.
        place = carry.place + jnp.where(total[0, 0, 0] < 0, zero, one)
        place = jnp.where(place < np.uint32(per_section), place, zero)
        section = carry.section + jnp.where(place == 0, one, zero)
        full, last = divmod(stop, per_section)
        unfinished = (section < np.uint32(full)) | (
            (section == np.uint32(full)) & (place < np.uint32(last))
        )
        return _Carry(unfinished, section, place, rows, product, total)

    first = _Carry(
        unfinished=jnp.array(True),
        section=jnp.array(start // per_section, jnp.uint32),
        place=jnp.array(start % per_section, jnp.uint32),
        rows=jnp.zeros((k, columns), wide),
        product=jnp.zeros((k, k), wide),
        total=jnp.zeros((sections, k, k), wide),
    )
    return lax.while_loop(lambda carry: carry.unfinished, step, varying(first, x))


def _never(end: _Carry) -> jax.Array:
    """False, but the compiler cannot tell without looking at the whole carry."""
    same = (end.section == end.place) & (end.rows[0, 0] == end.product[0, 0])
    return end.unfinished & same
