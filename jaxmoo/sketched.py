"""Gram matrices of blocks from sketches of their gradients.

Exact Gram matrices take every objective's gradient of a piece to one device. Sketches add up over
arrays, devices and examples as gradients do, and are short: they can be exchanged instead. The
Gram matrix is then an estimate; the combination, with the weights that follow from it, is exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp

from jaxmoo.aggregators import Aggregator
from jaxmoo.block_solve import Grams
from jaxmoo.blocks.sections import Section, section_key, sum_by_block
from jaxmoo.errors import ConfigError
from jaxmoo.kernels.contraction import cross_grams
from jaxmoo.kernels.reductions import grams_in_range
from jaxmoo.kernels.sketch import sketch_sections

__all__ = [
    "check_sketchable",
    "grams_of_sketches",
    "is_small",
    "sketch_blocks",
    "sketch_size",
]

# Told apart from what aggregators draw from the same key.
_SKETCH = 0x5E7C4


def sketch_size(gram: str) -> int | None:
    """Read how Gram matrices are formed.

    Args:
      gram: ``"exact"``, or ``"sketch:N"`` for sketches of N entries.

    Returns:
      N, or None.

    Raises:
      ConfigError: it is neither.

    Example:
      >>> sketch_size("sketch:16384"), sketch_size("exact")
      (16384, None)
    """
    if gram == "exact":
        return None
    found = re.fullmatch(r"sketch:(\d+)", str(gram))
    if found is None or int(found[1]) < 2:
        raise ConfigError(
            f"gram: expected 'exact' or 'sketch:N' with N at least 2, found {gram!r}. "
            "'sketch:16384' is a good start."
        )
    return int(found[1])


def check_sketchable(
    methods: Iterable[Aggregator],
    *,
    replicas: str = "mean_then_resolve",
    accumulated: bool = False,
    tensor: int = 1,
) -> None:
    """Refuse what Gram matrices cannot be estimated for.

    Args:
      methods: the aggregators.
      replicas: in which order replicas average and resolve.
      accumulated: whether microbatches' gradients are added up before they are resolved.
      tensor: devices that share every matrix product.

    Raises:
      ConfigError: with the reason.
    """
    for method in methods:
        if method.combine is not None:
            raise ConfigError(
                f"gram: {method.name} works coordinate by coordinate and reads no Gram matrix that "
                "could be sketched. Use gram='exact'."
            )
        if method.cross_gram:
            raise ConfigError(
                f"gram: {method.name} multiplies gradients of two batches, which are not sketched. "
                "Use gram='exact'."
            )
    if replicas != "mean_then_resolve":
        raise ConfigError(
            "gram: sketches of all replicas are added up, which is what mean_then_resolve means, "
            f"at the traffic of the other orders; found {replicas!r}. Use mean_then_resolve, or "
            "gram='exact'."
        )
    if accumulated:
        raise ConfigError(
            "gram: accumulate_first keeps every objective's gradient until the end of the step, so "
            "that nothing is left to sketch. Use resolve_each, or gram='exact'."
        )
    if tensor > 1:
        raise ConfigError(
            "gram: the compiler would gather gradients to sketch them where devices share matrix "
            f"products; found mesh.tensor={tensor}. Use mesh.tensor=1, or gram='exact'."
        )


def is_small(size: int, num_objectives: int) -> bool:
    """Whether a sketch is too small for its number of objectives.

    A sketch of N entries changes lengths in a space of K dimensions by a factor of about
    1 +- sqrt(K / N). Beyond a tenth, the weights of the least important objectives are noise.

    Example:
      >>> is_small(16_384, 64), is_small(1024, 64)
      (False, True)
    """
    return math.sqrt(num_objectives / size) > 0.1


def sketch_blocks(
    sections: Sequence[Section],
    numbers: jax.Array,
    size: int,
    *,
    key: jax.Array,
    platform: str | None,
) -> jax.Array:
    """Sketch the gradients of B blocks.

    Args:
      sections: gradients [k, S, ...] of arrays, with places.
      numbers: int [B], from which blocks draw.
      size: m.
      key: of the step.
      platform: see :func:`jaxmoo.kernels.sketch.sketch_sections`.

    Returns:
      [k, B, m].
    """
    key = jax.random.fold_in(key, _SKETCH)
    labels = [jnp.asarray(section.labels) for section in sections]
    keys = jax.vmap(section_key, (None, 0, 0))(
        key,
        jnp.concatenate([jnp.asarray(section.places) for section in sections]),
        numbers[jnp.concatenate(labels)],
    )
    found = sketch_sections([s.values for s in sections], keys, size, platform=platform)
    parts = [jnp.moveaxis(x, 0, 1)[:, None] for x in found]
    return jnp.moveaxis(sum_by_block(parts, labels, len(numbers)), 1, 0)


def grams_of_sketches(
    z: jax.Array,
    *,
    active: jax.Array | None = None,
    rescale: bool = False,
    total: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> Grams:
    """Estimate Gram matrices.

    The error is estimated from products of the even entries of sketches with the odd, which hold
    other entries of the gradients: what is in these products by chance is about as large as what is
    by chance in the Gram matrix.

    Args:
      z: sketches of all objectives [K, B, n], or a device's part of their entries.
      active: bool [K], or None.
      rescale: see :func:`jaxmoo.resolve.resolve_sections`.
      total: sums over the devices that hold the sketches' other entries.
    """

    def products(z: jax.Array) -> jax.Array:  # [2, B, K, K]
        between = cross_grams(z[..., ::2], z[..., 1::2])
        return total(jnp.stack([cross_grams(z, z), between + jnp.swapaxes(between, 1, 2)]))

    gram, by_chance = products(z)
    unit = jnp.ones(z.shape[1], gram.dtype)
    if rescale:
        gram, unit = grams_in_range(gram, active, lambda unit: products(z * unit[None, :, None])[0])
        by_chance = products(z * unit[None, :, None])[1]
    return Grams(gram, unit, _relative(by_chance, gram))


def _relative(error: jax.Array, gram: jax.Array) -> jax.Array:
    """Frobenius norms of errors over those of Gram matrices, [B], of what is finite."""
    finite = jnp.isfinite(gram) & jnp.isfinite(error)
    largest = jnp.where(finite, jnp.abs(gram), 0).max((1, 2), keepdims=True)
    by = jnp.where(finite & (largest > 0), 1 / jnp.where(largest > 0, largest, 1), 0)
    norms = [jnp.sqrt(((jnp.where(finite, x, 0) * by) ** 2).sum((1, 2))) for x in (error, gram)]
    return norms[0] / jnp.where(norms[1] > 0, norms[1], 1)
