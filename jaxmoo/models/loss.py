"""Negative log-likelihood of target tokens, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoo.models.decoder import Decoder
from jaxmoo.models.layers import at_least_float32

__all__ = ["language_loss", "target_mask", "token_nll"]


def target_mask(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Which tokens of a batch are predicted and scored.

    Args:
      batch: one language's ``tokens`` int32 [B, S], ``loss_mask`` bool [B, S] and, for packed
        rows, ``segment_ids`` int32 [B, S].

    Returns:
      bool [B, S]: the loss mask, without the first token of a row or segment, which nothing
      predicts.
    """
    mask = batch["loss_mask"].astype(bool).at[..., 0].set(False)
    segment_ids = batch.get("segment_ids")
    if segment_ids is not None:
        mask = mask.at[..., 1:].set(mask[..., 1:] & (segment_ids[..., 1:] == segment_ids[..., :-1]))
    return mask


def token_nll(
    model: Decoder, batch: Mapping[str, jax.Array], *, chunk: int | None = None
) -> jax.Array:
    """Negative log-likelihood of each target token, in nats.

    The head is applied to a few positions at a time, and only to positions that predict a target:
    each row's targets are moved to the front, and the loop ends where the longest row's do.

    Args:
      model: the decoder.
      batch: one language's ``tokens`` int32 [B, S], ``loss_mask`` bool [B, S] and, for packed
        rows, ``positions`` and ``segment_ids`` int32 [B, S].
      chunk: positions per row whose logits exist at one time; by default an eighth of the row,
        less for a large vocabulary.

    Returns:
      float32 [B, S]: entry [b, t] is -log p(tokens[b, t] | tokens[b, :t]) where `target_mask` is
      true, else 0.

    Raises:
      ConfigError: when S exceeds the model's longest sequence.
    """
    tokens = batch["tokens"]
    h_BSD = model.hidden(
        tokens, positions=batch.get("positions"), segment_ids=batch.get("segment_ids")
    )[:, :-1]
    targets = jnp.where(target_mask(batch), tokens, -1)[:, 1:]
    rows, columns = targets.shape
    if chunk is None:
        chunk = _default_chunk(rows, columns, model.config.vocab_size)
    chunk = max(1, min(chunk, columns))
    fill = -columns % chunk
    # Row by row, not over the whole batch: rows may lie on different devices.
    order = jnp.argsort(targets < 0, axis=1, stable=True)
    front_h = jnp.pad(
        jnp.take_along_axis(h_BSD, order[..., None], axis=1), ((0, 0), (0, fill), (0, 0))
    )
    front_targets = jnp.pad(
        jnp.take_along_axis(targets, order, axis=1), ((0, 0), (0, fill)), constant_values=-1
    )
    front_nll = _front_nll(front_h, model.head_kernel(), front_targets, chunk)[:, :columns]
    nll = jnp.put_along_axis(jnp.zeros_like(front_nll), order, front_nll, axis=1, inplace=False)
    return jnp.pad(nll, ((0, 0), (1, 0)))


def language_loss(
    model: Decoder, batch: Mapping[str, jax.Array], *, chunk: int | None = None
) -> jax.Array:
    """Mean negative log-likelihood per target token over one language's whole batch.

    Args:
      model: the decoder.
      batch: see `token_nll`.
      chunk: see `token_nll`.

    Returns:
      float32 scalar in nats; 0 when the batch has no target.
    """
    return token_nll(model, batch, chunk=chunk).sum() / jnp.maximum(target_mask(batch).sum(), 1)


def _default_chunk(rows: int, columns: int, vocab_size: int) -> int:
    """Positions per row: an eighth, at least 32 and at most 128 MiB of logits over all rows."""
    at_most = max(32, 2**25 // vocab_size)
    return -(-min(max(32, rows * columns // 8), at_most) // rows)


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


def _chunk_logits(h_BTD: jax.Array, kernel_DV: jax.Array, start: jax.Array, chunk: int) -> Any:
    h_BCD = jax.lax.dynamic_slice_in_dim(h_BTD, start, chunk, 1)
    return h_BCD, jnp.matmul(
        h_BCD, kernel_DV.astype(h_BTD.dtype), preferred_element_type=at_least_float32(h_BTD.dtype)
    )


def _put(into: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(into, piece.astype(into.dtype), start, 1)


# The loop's length depends on the data, so its derivative is written by hand: the backward pass
# forms each chunk's logits again.
@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _front_nll(
    h_BTD: jax.Array, kernel_DV: jax.Array, targets_BT: jax.Array, chunk: int
) -> jax.Array:
    """NLL [B, T] of rows whose targets come first; a target of -1 is none, its NLL 0."""
    return _forward(h_BTD, kernel_DV, targets_BT, chunk)[0]


def _forward(
    h_BTD: jax.Array, kernel_DV: jax.Array, targets_BT: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        nll, lse = carry
        start = i * chunk
        _, logits = _chunk_logits(h_BTD, kernel_DV, start, chunk)
        target = jax.lax.dynamic_slice_in_dim(targets_BT, start, chunk, 1)
        piece = jax.nn.logsumexp(logits, axis=-1)
        label = jnp.take_along_axis(logits, jnp.maximum(target, 0)[..., None], axis=-1)[..., 0]
        nll = _put(nll, jnp.where(target >= 0, piece - label, 0), start)
        return nll, _put(lse, piece, start)

    zeros = jnp.zeros(targets_BT.shape, at_least_float32(h_BTD.dtype))
    return jax.lax.fori_loop(0, _num_chunks(targets_BT, chunk), body, (zeros, zeros))


def _front_nll_fwd(h: Any, kernel: Any, targets: Any, chunk: int) -> tuple[jax.Array, Any]:
    nll, lse = _forward(h.value, kernel.value, targets.value, chunk)
    # An empty tuple tells the backward pass that nobody asks for the head's gradient: a frozen
    # head should not pay for one.
    wanted = (jnp.zeros(()),) if kernel.perturbed else ()
    return nll, (h.value, kernel.value, targets.value, lse, wanted)


def _front_nll_bwd(chunk: int, residuals: Any, cotangent: Any) -> tuple[Any, Any, None]:
    h_BTD, kernel_DV, targets_BT, lse_BT, wanted = residuals
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None, None

    def body(i: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        dh_BTD, dkernel = carry
        start = i * chunk
        h_BCD, logits = _chunk_logits(h_BTD, kernel_DV, start, chunk)
        target, lse, ct = (
            jax.lax.dynamic_slice_in_dim(x, start, chunk, 1)[..., None]
            for x in (targets_BT, lse_BT, cotangent)
        )
        is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == target
        dlogits = (jnp.exp(logits - lse) - is_target) * jnp.where(target >= 0, ct, 0)
        dlogits = dlogits.astype(h_BTD.dtype)
        dh_BCD = jnp.einsum("bcv,dv->bcd", dlogits, kernel_DV.astype(h_BTD.dtype))
        # As a product of plain matrices: the compiler's CPU backend has no others of bfloat16 with
        # a float32 result.
        h_ND, dlogits_NV = (x.reshape(-1, x.shape[-1]) for x in (h_BCD, dlogits))
        dkernel = tuple(
            total + jnp.matmul(h_ND.T, dlogits_NV, preferred_element_type=total.dtype)
            for total in dkernel
        )
        return _put(dh_BTD, dh_BCD, start), dkernel

    sum_dtype = at_least_float32(kernel_DV.dtype)
    zeros = jnp.zeros_like(h_BTD), tuple(jnp.zeros(kernel_DV.shape, sum_dtype) for _ in wanted)
    dh_BTD, dkernel = jax.lax.fori_loop(0, _num_chunks(targets_BT, chunk), body, zeros)
    return dh_BTD, (dkernel[0].astype(kernel_DV.dtype) if wanted else None), None


_front_nll.defvjp(_front_nll_fwd, _front_nll_bwd, symbolic_zeros=True)
