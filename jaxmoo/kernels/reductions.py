"""The two passes over per-objective gradients: Gram matrices and weighted sums.

Everything a Gram-based aggregator reads is K x K; these two functions are all that touches the
gradients themselves, so they are written to run at memory bandwidth and without copies.

Arrays have shape ``[K, S, n]``: K objectives, S sections (each belongs to one block), n elements.

Two forms of each exist because XLA needs them. On one device the passes read the array once, in
pieces that stay in cache. Arrays that the compiler partitions over several devices must instead
be contracted as a whole: slicing along a partitioned axis would make it gather the array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoo.dtypes import at_least_float32
from jaxmoo.kernels.contraction import cross_grams
from jaxmoo.kernels.cpu_grams import grams_by_slices, grams_of_many
from jaxmoo.kernels.cpu_sums import sum_in_pieces
from jaxmoo.kernels.gpu_grams import grams_in_one_kernel
from jaxmoo.kernels.tpu_grams import tpu_gram
from jaxmoo.platforms import interpreted, like_gpu, like_tpu, several_devices
from jaxmoo.sharding import divided_by_compiler, varying

__all__ = [
    "cross_grams",
    "gram_parts",
    "grams_in_range",
    "is_partitioned",
    "rows_of",
    "scaled_grams",
    "section_grams",
    "weighted_sum",
]

_AT_A_TIME = 2**20  # entries that are scaled, and so copied


def section_grams(
    arrays: Sequence[jax.Array], *, partitioned: bool | None = None
) -> list[jax.Array]:
    """Gram matrix of every section, accumulated in float32, or float64 for float64 gradients.

    Args:
      arrays: per-objective gradients, each [K, S, ...]. Given all at once they share the cores of
        a CPU.
      partitioned: whether the compiler partitions the arrays over several devices. By default,
        whether JAX has several.

    Returns:
      Gram matrices [S, K, K] of each array, float32 or float64. A non-finite row makes its own row
      and column non-finite.

    Example:
      >>> section_grams([jnp.array([[[1.0, 2.0]], [[0.0, 3.0]]])])
      [Array([[[5., 6.],
              [6., 9.]]], dtype=float32)]
    """
    return [x[:, 0] for x in gram_parts(arrays, partitioned=partitioned)]


@jax.named_scope("gram")
def gram_parts(
    arrays: Sequence[jax.Array],
    *,
    partitioned: bool | None = None,
    platform: str | None = None,
) -> list[jax.Array]:
    """Gram matrix of every section, in as many parts as the platform's kernel makes.

    Args:
      arrays: see :func:`section_grams`.
      partitioned: likewise.
      platform: the kind of devices on which the arrays lie, each piece by itself; see
        :mod:`jaxmoo.platforms`. On a GPU that takes a kernel, and on a TPU one per array, but
        neither where the compiler divides the pieces further: it cannot divide a kernel, and
        would gather what that reads. By default it is decided when the program is lowered,
        and takes no kernel; on a CPU only large arrays are then cut into slices.

    Returns:
      [S, P, K, K] of each array, float32 or float64: their sums over P are the Gram matrices.
    """

    def whole(arrays: list[jax.Array]) -> list[jax.Array]:
        return [cross_grams(x, x) for x in arrays]

    if is_partitioned(partitioned) or divided_by_compiler() or not arrays:
        found = whole(list(arrays))
    elif like_gpu(platform):
        return grams_in_one_kernel(arrays, interpret=interpreted(platform))
    elif like_tpu(platform):
        found = [tpu_gram(x, interpret=interpreted(platform)) for x in arrays]
    elif platform == "cpu":
        found = grams_by_slices(list(arrays))
    else:
        found = jax.lax.platform_dependent(list(arrays), cpu=grams_of_many, default=whole)
    return [x[:, None] for x in found]


def is_partitioned(given: bool | None) -> bool:
    """Whether the compiler partitions arrays; by default, whether JAX has several devices."""
    return several_devices() if given is None else given


def grams_in_range(
    grams: jax.Array,
    active: jax.Array | None,
    scaled: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Form Gram matrices anew, of scaled gradients, where squares left their type's range.

    Only when a square looks like it. One pass over the gradients tells whether what looks like zero
    is; two more are made if it is not, or if something looks infinite.

    Args:
      grams: [B, K, K].
      active: bool [K], or None.
      scaled: gives the Gram matrices of gradients times a number per block [B].

    Returns:
      The Gram matrices, and what the gradients of each block were multiplied by: powers of two.
    """
    kind = jnp.finfo(grams.dtype)
    # Wide enough that no sum of squares between has lost a part that counts.
    low, high = float(kind.tiny) * 2.0**60, float(kind.max) * 2.0**-30
    # What is below is far above it times the one, what is above far below it times the other.
    up, down = (2.0 ** (sign * kind.maxexp * 5 // 8) for sign in (1, -1))
    bound = 2.0 ** (kind.maxexp - 8)

    def squares_of(grams: jax.Array) -> jax.Array:
        return jnp.diagonal(grams, axis1=1, axis2=2)

    def largest(grams: jax.Array) -> jax.Array:
        squares = squares_of(grams)
        counted = jnp.isfinite(squares)
        return jnp.where(counted if active is None else counted & active, squares, 0).max(1)

    doubtful = ~((squares_of(grams) > low) & (squares_of(grams) < high))
    if active is not None:
        doubtful &= active
    one = jnp.ones(len(grams), grams.dtype)
    plain = varying((grams, one), grams, active)

    def search() -> tuple[jax.Array, jax.Array]:
        top = largest(grams)
        inverse = jnp.where(top > low, jax.lax.rsqrt(top), 0)  # of the largest norm; 0: not known

        def goes_on(carry: Any) -> jax.Array:
            passes, _, found, _ = carry
            unclear = (doubtful & (squares_of(found) != 0)).any()
            return (passes == 0) | ((passes == 1) & unclear) | (passes == 2)

        def look(carry: Any) -> Any:
            passes, inverse, *_ = carry
            # To a power of two, so that scaling rounds nothing.
            power = jax.lax.reduce_precision(
                jnp.clip(inverse, 1 / bound, bound), kind.nexp, mantissa_bits=0
            )
            power = jnp.where(inverse > 0, power, 1)
            unit = jnp.where(passes == 0, up, jnp.where(passes == 1, down, power))
            found = scaled(unit.astype(grams.dtype))
            top = largest(found)
            smaller = (passes == 0) & (inverse == 0) & (top > 0)
            larger = (passes == 1) & (top >= high * down**2)
            known = jnp.maximum(unit * jax.lax.rsqrt(top), 1 / bound)
            return passes + 1, jnp.where(smaller | larger, known, inverse), found, unit

        first = varying((jnp.zeros((), jnp.int32), inverse, grams, one), grams, active)
        passes, _, found, unit = jax.lax.while_loop(goes_on, look, first)
        squares = squares_of(found)
        wrong = (doubtful & jnp.isfinite(squares) & (squares != 0)).any(1) & (passes == 3)
        return jnp.where(wrong[:, None, None], found, grams), jnp.where(wrong, unit, 1)

    return jax.lax.cond(doubtful.any(), search, lambda: plain)


@jax.named_scope("gram")
def scaled_grams(
    x: jax.Array, scale: jax.Array, y: jax.Array | None = None, *, partitioned: bool | None = None
) -> jax.Array:
    """Gram matrix of every section, of gradients times a number.

    Args:
      x: per-objective gradients [K, S, ...].
      scale: [S].
      y: the gradients whose rows are the products' other side; by default ``x``.
      partitioned: as in :func:`section_grams`.

    Returns:
      Products of the scaled gradients [S, K, K], in the dtype that :func:`section_grams` has.

    Example:
      >>> scaled_grams(jnp.array([[[3e20, 4e20]]]), jnp.array([1e-20])).round(2).tolist()
      [[[25.0]]]
    """
    wide = at_least_float32(x.dtype)
    y = x if y is None else y

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        axes = tuple(range(2, x.ndim))
        by = scale.astype(wide).reshape(-1, *(1,) * (x.ndim - 1))
        rows, columns = (z.swapaxes(0, 1).astype(wide) * by for z in (x, y))
        return jax.lax.dot_general(
            rows, columns, ((axes, axes), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST
        )

    if is_partitioned(partitioned):
        return product(x, y)
    k, sections = x.shape[:2]
    x, y = x.reshape(k, sections, -1), y.reshape(k, sections, -1)
    if x.size <= _AT_A_TIME:
        return product(x, y)
    columns = max(128, _AT_A_TIME // max(1, k * sections))
    pieces = x.shape[2] // columns

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + product(
            *(jax.lax.dynamic_slice_in_dim(z, i * columns, columns, 2) for z in (x, y))
        )

    rest = product(x[:, :, pieces * columns :], y[:, :, pieces * columns :])
    return jax.lax.fori_loop(0, pieces, add, rest) if pieces else rest


@jax.named_scope("combine")
def weighted_sum(
    x: jax.Array, weights: jax.Array, *, partitioned: bool | None = None, many: bool = False
) -> jax.Array:
    """Combine the objectives of every section.

    An objective of weight 0 does not enter at all, so its values may be non-finite.

    Args:
      x: per-objective gradients [K, S, ...].
      weights: [S, K].
      partitioned: as in :func:`section_grams`.
      many: whether the program combines so many arrays that compiling it counts.

    Returns:
      Sums [S, ...] in the dtype of ``x``, accumulated in float32, or float64 where that is it.

    Example:
      >>> x = jnp.array([[[1.0, 2.0]], [[jnp.nan, 3.0]]])
      >>> weighted_sum(x, jnp.array([[0.5, 0.0]]))
      Array([[0.5, 1. ]], dtype=float32)
    """
    wide = at_least_float32(x.dtype)
    weights = weights.astype(wide)
    columns = weights.T.reshape(*weights.T.shape, *(1,) * (x.ndim - 2))  # [K, S, 1, ...]
    if is_partitioned(partitioned):
        kept = jnp.where(columns != 0, x, 0)
        total = jax.lax.dot_general(
            weights,
            kept,
            (((1,), (0,)), ((0,), (1,))),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=wide,
        )
        return total.astype(x.dtype)

    def at_once(x: jax.Array, weights: jax.Array) -> jax.Array:
        # One fused elementwise pass: every row is read once and nothing is copied.
        total = jnp.zeros(x.shape[1:], wide)
        for row, column in zip(x, columns, strict=True):
            total += jnp.where(column != 0, column * row.astype(wide), 0)
        return total.astype(x.dtype)

    if many:
        return jax.lax.platform_dependent(x, weights, cpu=sum_in_pieces, default=at_once)
    return at_once(x, weights)


def rows_of(x: jax.Array, rows: Sequence[jax.Array]) -> list[jax.Array]:
    """Rows of a matrix, chosen by products.

    XLA reads a few numbers of a small array in every kernel that needs them, and computes them
    there anew. No two of these kernels are then the same, and each is compiled by itself. On CPUs a
    product is never made part of another kernel.

    Args:
      x: numbers [B, K].
      rows: which ones each result consists of, int [S] each.

    Returns:
      [S, K] each, exactly; NaN for a number that is not finite, which spoils no other row.

    Example:
      >>> rows_of(jnp.array([[1.0, 2.0], [3.0, jnp.inf]]), [jnp.array([0]), jnp.array([1])])
      [Array([[1., 2.]], dtype=float32), Array([[ 3., nan]], dtype=float32)]
    """
    finite = jnp.isfinite(x)
    numbers = jnp.concatenate([jnp.where(finite, x, 0), finite.astype(x.dtype)], 1)
    every = jnp.arange(len(x))

    def choose(rows: jax.Array) -> jax.Array:
        chosen = (rows[:, None] == every).astype(x.dtype)
        found = jnp.matmul(chosen, numbers, precision=jax.lax.Precision.HIGHEST)
        found, is_finite = jax.lax.split(found, (x.shape[1],) * 2, axis=1)
        return jnp.where(is_finite > 0, found, jnp.nan)

    return [choose(some) for some in rows]
