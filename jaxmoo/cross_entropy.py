"""Cross-entropy of a table of vectors against hidden states, without ever holding all logits.

Shape suffixes: B rows, T positions, C positions of a chunk, D hidden, V vocabulary. In every row
the targets come first; a target of -1 is none, and the loops end where the longest row's targets
do. A loop whose length depends on the data has no derivative of JAX's making, so all of them are
written by hand: the backward pass forms each chunk's logits again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

__all__ = [
    "at_least_float32",
    "chunked_nll",
    "hidden_gradient",
    "nll_and_normaliser",
    "table_gradient",
]


def at_least_float32(dtype: Any) -> Any:
    """The dtype for steps that half precision would spoil."""
    return jnp.promote_types(dtype, jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def chunked_nll(
    h_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, chunk: int
) -> jax.Array:
    """Negative log-likelihood of each target.

    Args:
      h_BTD: hidden states [B, T, D].
      table_VD: one vector per token of the vocabulary [V, D]; used in the dtype of ``h_BTD``.
      targets_BT: int32 [B, T]; -1 for none.
      chunk: positions per row whose logits exist at one time; a divisor of T.

    Returns:
      float32 [B, T] in nats; 0 where there is no target.

    Example:
      >>> chunked_nll(jnp.zeros((1, 2, 3)), jnp.ones((4, 3)), jnp.array([[1, -1]]), 1).round(3)
      Array([[1.386, 0.   ]], dtype=float32)
    """
    return nll_and_normaliser(h_BTD, table_VD, targets_BT, chunk)[0]


def nll_and_normaliser(
    h_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Return :func:`chunked_nll` and the logarithm of the softmax's denominator, [B, T] each."""

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        nll, lse = carry
        start = i * chunk
        logits = _logits(_take(h_BTD, start, chunk), table_VD)
        target = _take(targets_BT, start, chunk)
        piece = jax.nn.logsumexp(logits, axis=-1)
        label = jnp.take_along_axis(logits, jnp.maximum(target, 0)[..., None], axis=-1)[..., 0]
        nll = _put(nll, jnp.where(target >= 0, piece - label, 0), start)
        return nll, _put(lse, piece, start)

    zeros = jnp.zeros(targets_BT.shape, at_least_float32(h_BTD.dtype))
    return jax.lax.fori_loop(0, _num_chunks(targets_BT, chunk), body, (zeros, zeros))


def hidden_gradient(
    h_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    lse_BT: jax.Array,
    cotangent_BT: jax.Array,
    chunk: int,
) -> jax.Array:
    """Gradient of :func:`chunked_nll` with respect to the hidden states, [B, T, D]."""

    def body(i: jax.Array, dh_BTD: jax.Array) -> jax.Array:
        start = i * chunk
        pieces = (_take(x, start, chunk) for x in (targets_BT, lse_BT, cotangent_BT))
        dlogits = _logit_gradient(_take(h_BTD, start, chunk), table_VD, *pieces, first_token=0)
        return _put(dh_BTD, jnp.einsum("bcv,vd->bcd", dlogits, table_VD.astype(h_BTD.dtype)), start)

    return jax.lax.fori_loop(0, _num_chunks(targets_BT, chunk), body, jnp.zeros_like(h_BTD))


def table_gradient(
    h_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    lse_BT: jax.Array,
    cotangent_BT: jax.Array,
    chunk: int,
    first_token: jax.Array | int = 0,
) -> jax.Array:
    """Gradient of :func:`chunked_nll` with respect to the table, or to a slice of its rows.

    Args:
      h_BTD: see :func:`chunked_nll`.
      table_VD: the slice.
      targets_BT: see :func:`chunked_nll`.
      lse_BT: from :func:`nll_and_normaliser` with the whole table.
      cotangent_BT: of the NLL.
      chunk: see :func:`chunked_nll`.
      first_token: number of the slice's first token.

    Returns:
      float32 of the slice's shape.
    """

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        start = i * chunk
        h_BCD = _take(h_BTD, start, chunk)
        pieces = (_take(x, start, chunk) for x in (targets_BT, lse_BT, cotangent_BT))
        dlogits = _logit_gradient(h_BCD, table_VD, *pieces, first_token=first_token)
        # As a product of plain matrices: the compiler's CPU backend has no others of bfloat16 with
        # a float32 result.
        h_ND, dlogits_NV = (x.reshape(-1, x.shape[-1]) for x in (h_BCD, dlogits))
        return total + jnp.matmul(dlogits_NV.T, h_ND, preferred_element_type=total.dtype)

    zeros = jnp.zeros(table_VD.shape, at_least_float32(h_BTD.dtype))
    return jax.lax.fori_loop(0, _num_chunks(targets_BT, chunk), body, zeros)


@jax.custom_batching.custom_vmap
def _over_batch_max(count: jax.Array) -> jax.Array:
    """Identity; mapped over an axis, the maximum over that axis, the same for all.

    A loop whose length came from a mapped value would become a loop with a mapped carry, all of
    it copied by a select in every round.
    """
    return count


@_over_batch_max.def_vmap
def _(axis_size: int, in_batched: list[bool], count: jax.Array) -> tuple[jax.Array, bool]:
    del axis_size
    return (_over_batch_max(count.max(0)) if in_batched[0] else _over_batch_max(count)), False


def _num_chunks(targets_BT: jax.Array, chunk: int) -> jax.Array:
    longest = (targets_BT >= 0).sum(1).max()
    return _over_batch_max((longest + chunk - 1) // chunk)


def _take(x: jax.Array, start: jax.Array, chunk: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, chunk, 1)


def _put(into: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(into, piece.astype(into.dtype), start, 1)


def _logits(h_BCD: jax.Array, table_VD: jax.Array) -> jax.Array:
    return jnp.matmul(
        h_BCD,
        table_VD.astype(h_BCD.dtype).T,
        preferred_element_type=at_least_float32(h_BCD.dtype),
    )


def _logit_gradient(
    h_BCD: jax.Array,
    table_VD: jax.Array,
    target: jax.Array,
    lse: jax.Array,
    cotangent: jax.Array,
    *,
    first_token: jax.Array | int,
) -> jax.Array:
    logits = _logits(h_BCD, table_VD)
    token = first_token + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    ct = jnp.where(target >= 0, cotangent, 0)[..., None]
    dlogits = (jnp.exp(logits - lse[..., None]) - (token == target[..., None])) * ct
    return dlogits.astype(h_BCD.dtype)


def _forward(h: Any, table: Any, targets: Any, chunk: int) -> tuple[jax.Array, Any]:
    nll, lse = nll_and_normaliser(h.value, table.value, targets.value, chunk)
    # An empty tuple tells the backward pass that nobody asks for the table's gradient: a frozen
    # one should not pay for it.
    wanted = (jnp.zeros(()),) if table.perturbed else ()
    return nll, (h.value, table.value, targets.value, lse, wanted)


def _backward(chunk: int, residuals: Any, cotangent: Any) -> tuple[Any, Any, None]:
    *primals, wanted = residuals
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    dh = hidden_gradient(*primals, cotangent, chunk)
    if not wanted:
        return dh, None, None
    return dh, table_gradient(*primals, cotangent, chunk).astype(primals[1].dtype), None


chunked_nll.defvjp(_forward, _backward, symbolic_zeros=True)
