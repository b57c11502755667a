"""Cross-entropy of a table of vectors against hidden states, without ever holding all logits.

Shape suffixes: B rows, T positions, C positions of a chunk, D hidden, V vocabulary. In every row
the targets come first; a target of -1 is none, and the loops end where the longest row's targets
do. A loop whose length depends on the data has no derivative of JAX's making, so all of them are
written by hand.

The NLL of a position depends on its own hidden state alone. So its gradient with respect to that
state, the position's *slope*, is formed in the forward pass, while the chunk's logits are there;
the backward pass only scales it. For the table's gradient the logits are formed once more.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoo.dtypes import at_least_float32

__all__ = [
    "PLAIN",
    "Logits",
    "Scores",
    "chunked_nll",
    "hidden_gradient",
    "scores",
    "table_gradient",
]


class Logits(NamedTuple):
    """What becomes of the products of hidden states and the table: cap tanh(scale x / cap).

    Attributes:
      scale: what they are multiplied by.
      cap: bound towards which they go then; None: there is none.

    Example:
      >>> float(Logits(scale=2.0, cap=30.0).of(jnp.float32(100.0)).round(2))
      30.0
    """

    scale: float = 1.0
    cap: float | None = None

    def of(self, products: jax.Array) -> jax.Array:
        """Return the logits."""
        logits = products if self.scale == 1 else products * self.scale
        return logits if self.cap is None else self.cap * jnp.tanh(logits / self.cap)

    def pull_back(self, logits: jax.Array, gradient: jax.Array) -> jax.Array:
        """Turn a gradient with respect to logits into that with respect to the products."""
        if self.cap is not None:
            gradient = gradient * (1 - jnp.square(logits / self.cap))
        return gradient if self.scale == 1 else gradient * self.scale


PLAIN = Logits()


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def chunked_nll(
    h_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    chunk: int,
    form: Logits = PLAIN,
) -> jax.Array:
    """Negative log-likelihood of each target.

    Args:
      h_BTD: hidden states [B, T, D].
      table_VD: one vector per token of the vocabulary [V, D]; used in the dtype of ``h_BTD``.
      targets_BT: int32 [B, T]; -1 for none.
      chunk: positions per row whose logits exist at one time; a divisor of T.
      form: how the products become logits.

    Returns:
      float32 [B, T] in nats; 0 where there is no target.

    Example:
      >>> chunked_nll(jnp.zeros((1, 2, 3)), jnp.ones((4, 3)), jnp.array([[1, -1]]), 1).round(3)
      Array([[1.386, 0.   ]], dtype=float32)
    """
    return scores(h_BTD, table_VD, targets_BT, chunk, form).nll


class Scores(NamedTuple):
    """What the forward pass finds; 0 where there is no target."""

    nll: jax.Array  # [B, T] in nats
    normaliser: jax.Array  # [B, T], logarithm of the softmax's denominator
    slope: jax.Array | None  # [B, T, D] in the dtype of the hidden states


def scores(
    h_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    chunk: int,
    form: Logits = PLAIN,
    *,
    slopes: bool = False,
) -> Scores:
    """Return :func:`chunked_nll`, what its derivatives need, and if asked its slopes."""

    def body(i: jax.Array, found: Scores) -> Scores:
        start = i * chunk
        logits = _logits(_take(h_BTD, start, chunk), table_VD, form)
        target = _take(targets_BT, start, chunk)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        label = jnp.take_along_axis(logits, jnp.maximum(target, 0)[..., None], axis=-1)[..., 0]
        piece = Scores(jnp.where(target >= 0, normaliser - label, 0), normaliser, None)
        if slopes:
            dlogits = _product_gradient(logits, target, normaliser, 1.0, form).astype(h_BTD.dtype)
            table = table_VD.astype(h_BTD.dtype)
            slope = jnp.matmul(dlogits, table, preferred_element_type=logits.dtype)
            piece = piece._replace(slope=slope)
        return jax.tree.map(lambda into, x: _put(into, x, start), found, piece)

    zeros = jnp.zeros(targets_BT.shape, at_least_float32(h_BTD.dtype))
    none = Scores(zeros, zeros, jnp.zeros_like(h_BTD) if slopes else None)
    return jax.lax.fori_loop(0, _num_chunks(targets_BT, chunk), body, none)


def hidden_gradient(
    slope_BTD: jax.Array, targets_BT: jax.Array, cotangent_BT: jax.Array
) -> jax.Array:
    """Gradient of :func:`chunked_nll` with respect to the hidden states.

    Args:
      slope_BTD: from :func:`scores`.
      targets_BT: see :func:`chunked_nll`.
      cotangent_BT: of the NLL.

    Returns:
      [B, T, D] in the dtype of the slopes.
    """
    ct = jnp.where(targets_BT >= 0, cotangent_BT, 0)[..., None]
    return (slope_BTD.astype(ct.dtype) * ct).astype(slope_BTD.dtype)


def table_gradient(
    h_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    lse_BT: jax.Array,
    cotangent_BT: jax.Array,
    chunk: int,
    first_token: jax.Array | int = 0,
    *,
    form: Logits = PLAIN,
    skip: bool = True,
    pieces: int = 1,
) -> jax.Array:
    """Gradient of :func:`chunked_nll` with respect to the table, or to a slice of its rows.

    Args:
      h_BTD: see :func:`chunked_nll`.
      table_VD: the slice.
      targets_BT: see :func:`chunked_nll`.
      lse_BT: the normaliser from :func:`scores` with the whole table.
      cotangent_BT: of the NLL.
      chunk: see :func:`chunked_nll`.
      first_token: number of the slice's first token.
      form: see :func:`chunked_nll`.
      skip: whether to skip chunks without targets. A single chunk then is a loop as well, of no
        round or one.
      pieces: into how many its columns are cut.

    Returns:
      float32 [pieces, V, D / pieces] of the slice.
    """

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        start = i * chunk
        h_BCD = _take(h_BTD, start, chunk)
        targets, lse, cotangent = (
            _take(x, start, chunk) for x in (targets_BT, lse_BT, cotangent_BT)
        )
        logits = _logits(h_BCD, table_VD, form)
        dlogits = _product_gradient(logits, targets, lse, cotangent, form, first_token)
        dlogits = dlogits.astype(h_BTD.dtype)
        # As a product of plain matrices: the compiler's CPU backend has no others of bfloat16 with
        # a float32 result.
        h_ND, dlogits_NV = (x.reshape(-1, x.shape[-1]) for x in (h_BCD, dlogits))
        if pieces == 1:
            new = jnp.matmul(dlogits_NV.T, h_ND, preferred_element_type=total.dtype)[None]
        else:  # from the product in this order, rather than by a copy
            h_NPD = h_ND.reshape(len(h_ND), pieces, -1)
            new = jnp.einsum("nv,npd->pvd", dlogits_NV, h_NPD, preferred_element_type=total.dtype)
        return total + new

    if not skip and chunk == targets_BT.shape[1]:
        return body(jnp.int32(0), jnp.float32(0))
    rows, columns = table_VD.shape
    zeros = jnp.zeros((pieces, rows, columns // pieces), at_least_float32(h_BTD.dtype))
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


def _logits(h_BCD: jax.Array, table_VD: jax.Array, form: Logits) -> jax.Array:
    products = jnp.matmul(
        h_BCD,
        table_VD.astype(h_BCD.dtype).T,
        preferred_element_type=at_least_float32(h_BCD.dtype),
    )
    return form.of(products)


def _product_gradient(
    logits: jax.Array,
    target: jax.Array,
    normaliser: jax.Array,
    cotangent: jax.Array | float,
    form: Logits,
    first_token: jax.Array | int = 0,
) -> jax.Array:
    token = first_token + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    ct = jnp.where(target >= 0, cotangent, 0)[..., None]
    gradient = (jnp.exp(logits - normaliser[..., None]) - (token == target[..., None])) * ct
    return form.pull_back(logits, gradient)


def _forward(
    h: Any, table: Any, targets: Any, chunk: int, form: Logits = PLAIN
) -> tuple[jax.Array, Any]:
    # What nobody asks for, a frozen table's gradient or that of what is below it, costs nothing.
    found = scores(h.value, table.value, targets.value, chunk, form, slopes=h.perturbed)
    rest = (h.value, table.value, found.normaliser) if table.perturbed else None
    return found.nll, (found.slope, targets.value, rest)


def _backward(chunk: int, form: Logits, residuals: Any, cotangent: Any) -> tuple[Any, Any, None]:
    slope, targets, rest = residuals
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    dh = None if slope is None else hidden_gradient(slope, targets, cotangent)
    if rest is None:
        return dh, None, None
    h, table, normaliser = rest
    (dtable,) = table_gradient(h, table, targets, normaliser, cotangent, chunk, form=form)
    return dh, dtable.astype(table.dtype), None


chunked_nll.defvjp(_forward, _backward, symbolic_zeros=True)
