"""What the Gram matrix of one block gives: weights, and the norms of the update and of the mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoo.aggregators.aggregator import Aggregator
from jaxmoo.aggregators.solvers import mean_norm as norm_of
from jaxmoo.aggregators.weighing import draw, weigh_block
from jaxmoo.kernels.launch import in_one_launch
from jaxmoo.kernels.linear import diagonal, pairs

__all__ = ["Solved", "matching", "solve_block", "unsolved"]


class Solved(NamedTuple):
    """What the Gram matrix of a block gives; [B, ...] of B blocks."""

    gram: jax.Array  # [K, K], zero where an objective is left out
    nonfinite: jax.Array  # bool [K]: present, but not finite
    weights: jax.Array  # [K]
    mean_norm: jax.Array  # []
    update_norm: jax.Array  # []


def unsolved(num_blocks: int, k: int, dtype: Any) -> Solved:
    """Those of blocks that no group solves."""
    shapes: list[tuple[int, ...]] = [(k, k), (k,), (k,), (), ()]
    return Solved(*(jnp.zeros((num_blocks, *shape), dtype) for shape in shapes))._replace(
        nonfinite=jnp.zeros((num_blocks, k), bool)
    )


def solve_block(
    method: Aggregator,
    gram: jax.Array,
    product: jax.Array,
    state: Any,
    number: jax.Array,
    *,
    active: jax.Array,
    preference: jax.Array | None,
    key: jax.Array,
    match_norm: bool,
) -> tuple[Solved, Any]:
    """Solve one block, given its Gram matrix and the one that the method reads."""
    if method.elementary:
        importance = None if preference is None else preference.astype(gram.dtype)
        drawn = draw(method, key, number, len(active))
        found = _solve_elementary(
            gram, active, importance, drawn, method=method, match_norm=match_norm
        )
        return found, state

    def weigh(gram: jax.Array, used: jax.Array) -> tuple[jax.Array, Any]:
        if method.combine is not None:
            return jnp.zeros(len(active), gram.dtype), state
        return weigh_block(
            method,
            product if method.cross_gram else gram,
            state=state,
            key=key,
            block=number,
            active=used,
            preference=preference,
        )

    return _solve(gram, active, preference, weigh, match_norm)


@in_one_launch
def _solve_elementary(
    gram: jax.Array,
    active: jax.Array,
    preference: jax.Array | None,
    drawn: jax.Array | None,
    *,
    method: Aggregator,
    match_norm: bool,
) -> Solved:
    """Solve one block by a method of which a kernel takes everything."""

    def weigh(gram: jax.Array, used: jax.Array) -> tuple[jax.Array, Any]:
        return weigh_block(method, gram, active=used, preference=preference, drawn=drawn)

    return _solve(gram, active, preference, weigh, match_norm)[0]


def _solve(
    gram: jax.Array,
    active: jax.Array,
    preference: jax.Array | None,
    weigh: Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]],
    match_norm: bool,
) -> tuple[Solved, Any]:
    """Weigh one block's objectives, without those that are not finite, and measure the update."""
    finite = jnp.isfinite(diagonal(gram))
    used = active & finite
    gram = jnp.where(pairs(used), gram, 0.0)
    weights, state = weigh(gram, used)
    mean_norm = norm_of(gram, _share(used, preference, gram.dtype))
    update_norm = norm_of(gram, weights)
    if match_norm:
        scale = matching(mean_norm, update_norm, gram)
        weights, update_norm = weights * scale, update_norm * scale
    return Solved(gram, active & ~finite, weights, mean_norm, update_norm), state


def _share(used: jax.Array, preference: jax.Array | None, dtype: Any) -> jax.Array:
    """Weights of the mean gradient over the objectives used, [K]."""
    share = jnp.where(used, 1.0 if preference is None else preference, 0).astype(dtype)
    return share / jnp.maximum(jnp.sum(share), float(jnp.finfo(dtype).tiny))


def matching(mean_norm: jax.Array, update_norm: jax.Array, gram: jax.Array) -> jax.Array:
    """Factor that brings a block's update to its mean gradient's norm."""
    # A norm this far below the gradients' is rounding (its square, 1e-5 of theirs in float32): the
    # block is stationary, and scaling it up would make a step of noise.
    largest = jnp.max(diagonal(gram))
    stationary = update_norm**2 <= 84 * float(jnp.finfo(gram.dtype).eps) * largest
    return jnp.where(stationary, 1.0, mean_norm / jnp.where(stationary, 1.0, update_norm))
