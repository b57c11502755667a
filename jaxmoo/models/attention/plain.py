"""Attention by plain products and a softmax.

Shape suffixes: B batch, S sequence, N query heads, G key/value heads, H head width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmoo.dtypes import at_least_float32
from jaxmoo.models.attention.windows import Window, size_of

__all__ = ["attend_causally", "attend_where"]


def attend_where(
    q_BSNH: jax.Array,
    k_BTGH: jax.Array,
    v_BTGH: jax.Array,
    mask_BST: jax.Array,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Attention to tokens that a mask says, by plain products and a softmax.

    Args:
      q_BSNH: queries.
      k_BTGH: keys.
      v_BTGH: values.
      mask_BST: which token attends to which.
      scale: see :func:`attend`.
      soft_cap: see :func:`attend`.

    Returns:
      [B, S, N, H] in the dtype of the queries.

    Example:
      >>> q, kv = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 6, 2, 8))
      >>> attend_where(q, kv, kv, jnp.ones((2, 5, 6), bool)).shape
      (2, 5, 4, 8)
    """
    mask = mask_BST[:, None]
    if soft_cap is None:
        return jax.nn.dot_product_attention(
            q_BSNH, k_BTGH, v_BTGH, mask=mask, scale=scale, implementation="xla"
        )
    return _capped(q_BSNH, k_BTGH, v_BTGH, _bias(mask, q_BSNH.dtype), scale, soft_cap)


def attend_causally(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    window: Window,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """See :func:`jaxmoo.models.attention.attend`."""
    positions = jnp.arange(q.shape[1])
    # Compilers take masks out of the loop over layers and keep them throughout. What is added to
    # the scores, and bound to one layer's queries until it is, is then kept as [B, 1, S, S] at
    # most; a mask to select by, for the scores of every language and head.
    q, positions, segment_ids = jax.lax.optimization_barrier((q, positions, segment_ids))
    bias = _bias(_mask(positions, segment_ids, size_of(window)), q.dtype)
    if soft_cap is not None:
        return _capped(q, k, v, bias, scale, soft_cap)
    return jax.nn.dot_product_attention(q, k, v, bias=bias, scale=scale, implementation="xla")


def _bias(mask: jax.Array, dtype: Any) -> jax.Array:
    """What is added to scores, [.., 1, S, T]."""
    lowest = -0.7 * jnp.finfo(jnp.float32).max
    return jnp.where(mask, 0, lowest).astype(at_least_float32(dtype))


def _capped(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, scale: float | None, cap: float
) -> jax.Array:
    """Attention with scores that go towards a bound, which JAX's own function does not have."""
    rows, length, heads, width = q.shape
    grouped = q.reshape(rows, length, k.shape[2], -1, width)
    scores = jnp.einsum(
        "bsgrh,btgh->bgrst", grouped, k, preferred_element_type=at_least_float32(q.dtype)
    )
    scores = cap * jnp.tanh(scores * (width**-0.5 if scale is None else scale) / cap)
    weights = jax.nn.softmax(scores + bias[:, :, None], axis=-1).astype(v.dtype)
    return jnp.einsum("bgrst,btgh->bsgrh", weights, v).reshape(rows, length, heads, width)


def _mask(
    positions: jax.Array, segment_ids: jax.Array | None, window: int | jax.Array | None
) -> jax.Array:
    """Which token [.., 1, S, 1] sees which [.., 1, 1, S]; bool [1 or B, 1, S, S]."""
    distance = positions[:, None] - positions[None, :]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if segment_ids is None:
        return mask[None, None]
    return mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
