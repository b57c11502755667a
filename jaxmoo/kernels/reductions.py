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

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoo.dtypes import at_least_float32
from jaxmoo.kernels.contraction import cross_grams
from jaxmoo.kernels.cpu_grams import grams_by_slices
from jaxmoo.kernels.gpu_grams import grams_in_one_kernel
from jaxmoo.kernels.tpu_grams import tpu_gram
from jaxmoo.platforms import interpreted, like_gpu, like_tpu, several_devices
from jaxmoo.sharding import divided_by_compiler, varying

__all__ = [
    "cross_grams",
    "gram_parts",
    "grams_in_range",
    "scaled_grams",
    "section_grams",
    "section_sizes",
    "weighted_sum",
]

_AT_A_TIME = 2**16  # entries that are scaled, and so copied


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
        and takes no kernel.

    Returns:
      [S, P, K, K] of each array, float32 or float64: their sums over P are the Gram matrices.
    """

    def whole(arrays: list[jax.Array]) -> list[jax.Array]:
        return [cross_grams(x, x) for x in arrays]

    if _is_partitioned(partitioned) or divided_by_compiler() or not arrays:
        found = whole(list(arrays))
    elif like_gpu(platform):
        return grams_in_one_kernel(arrays, interpret=interpreted(platform))
    elif like_tpu(platform):
        found = [tpu_gram(x, interpret=interpreted(platform)) for x in arrays]
    elif platform == "cpu":
        found = grams_by_slices(list(arrays))
    else:
        found = jax.lax.platform_dependent(list(arrays), cpu=grams_by_slices, default=whole)
    return [x[:, None] for x in found]


def _is_partitioned(given: bool | None) -> bool:
    return several_devices() if given is None else given


def section_sizes(x: jax.Array, *, partitioned: bool | None = None) -> jax.Array:
    """Largest absolute entry of every row of every section.

    Args:
      x: per-objective gradients [K, S, ...].
      partitioned: as in :func:`section_grams`.

    Returns:
      [S, K], float32 or float64; infinite for a row that is not finite.

    Example:
      >>> section_sizes(jnp.array([[[1.0, -2.0]], [[jnp.inf, 3.0]]])).tolist()
      [[2.0, inf]]
    """
    x = jax.lax.stop_gradient(x.reshape(*x.shape[:2], -1))

    def size(x: jax.Array) -> jax.Array:
        return jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))  # a maximum may pass over a NaN

    if _is_partitioned(partitioned):
        largest = jnp.max(size(x), axis=2, initial=0)
    else:  # in one reduction, or the entries' sizes would be copied
        zero = np.zeros((), x.dtype)
        largest = jax.lax.reduce(x, zero, lambda a, b: jnp.maximum(size(a), size(b)), (2,))
    return largest.T.astype(at_least_float32(x.dtype))


def grams_in_range(
    grams: jax.Array,
    active: jax.Array | None,
    sizes: Callable[[], jax.Array],
    scaled: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Form Gram matrices anew, of scaled gradients, where squares left their type's range.

    The passes over the gradients that this takes are made only when a square looks like it.

    Args:
      grams: [B, K, K].
      active: bool [K], or None.
      sizes: gives the largest entries of the gradients [B, K].
      scaled: gives the Gram matrices of gradients times a number per block [B].

    Returns:
      The Gram matrices, and what the gradients of each block were multiplied by: powers of two.
    """
    kind = jnp.finfo(grams.dtype)
    squares = jnp.diagonal(grams, axis1=1, axis2=2)
    # Wide enough that no sum of squares between has lost a part that counts.
    doubtful = ~((squares > kind.tiny * 2.0**60) & (squares < kind.max * 2.0**-30))
    if active is not None:
        doubtful &= active
    plain = varying((grams, jnp.ones(len(grams), grams.dtype)), grams, active)

    def look() -> tuple[jax.Array, jax.Array]:
        largest = sizes()
        largest = jnp.where(jnp.isfinite(largest), largest, 0)
        wrong = (doubtful & (largest > 0)).any(1)
        # To a power of two, so that scaling rounds nothing.
        bound = 2.0 ** (kind.maxexp - 8)
        power = jax.lax.reduce_precision(
            jnp.clip(largest.max(1), 1 / bound, bound), kind.nexp, mantissa_bits=0
        )
        unit = jnp.where(wrong, 1 / power, 1)

        def again() -> tuple[jax.Array, jax.Array]:
            return jnp.where(wrong[:, None, None], scaled(unit), grams), unit

        return jax.lax.cond(wrong.any(), again, lambda: plain)

    return jax.lax.cond(doubtful.any(), look, lambda: plain)


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
        by = scale.astype(wide).reshape(1, -1, *(1,) * (x.ndim - 2))
        return cross_grams(x.astype(wide) * by, y.astype(wide) * by)

    if _is_partitioned(partitioned):
        return product(x, y)
    k, sections = x.shape[:2]
    x, y = x.reshape(k, sections, -1), y.reshape(k, sections, -1)
    columns = max(128, _AT_A_TIME // max(1, k * sections))
    pieces = x.shape[2] // columns

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + product(
            *(jax.lax.dynamic_slice_in_dim(z, i * columns, columns, 2) for z in (x, y))
        )

    rest = product(x[:, :, pieces * columns :], y[:, :, pieces * columns :])
    return jax.lax.fori_loop(0, pieces, add, rest) if pieces else rest


@jax.named_scope("combine")
def weighted_sum(x: jax.Array, weights: jax.Array, *, partitioned: bool | None = None) -> jax.Array:
    """Combine the objectives of every section.

    An objective of weight 0 does not enter at all, so its values may be non-finite.

    Args:
      x: per-objective gradients [K, S, ...].
      weights: [S, K].
      partitioned: as in :func:`section_grams`.

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
    if _is_partitioned(partitioned):
        kept = jnp.where(columns != 0, x, 0)
        total = jax.lax.dot_general(
            weights,
            kept,
            (((1,), (0,)), ((0,), (1,))),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=wide,
        )
        return total.astype(x.dtype)
    # One fused elementwise pass: every row is read once and nothing is copied.
    total = jnp.zeros(x.shape[1:], wide)
    for row, column in zip(x, columns, strict=True):
        total += jnp.where(column != 0, column * row.astype(wide), 0)
    return total.astype(x.dtype)
