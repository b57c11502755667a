"""Negative log-likelihood of target tokens, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxmoo.engine import vocabulary
from jaxmoo.engine.block import sum_over_examples
from jaxmoo.errors import ConfigError
from jaxmoo.models.decoder import Decoder
from jaxmoo.models.experts import Load

__all__ = [
    "front_nll",
    "language_loss",
    "router_loss",
    "summed_loss",
    "target_mask",
    "token_nll",
]


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
        less for a large vocabulary (see :func:`jaxmoo.engine.vocabulary.logits_at_once`).

    Returns:
      float32 [B, S]: entry [b, t] is -log p(tokens[b, t] | tokens[b, :t]) where `target_mask` is
      true, else 0.

    Raises:
      ConfigError: when S exceeds the model's longest sequence.
    """
    return _nll_and_router_loss(model, batch, 0.0, chunk)[0]


def summed_loss(
    model: Decoder,
    batch: Mapping[str, jax.Array],
    *,
    router_coef: float = 0.0,
    scale_B: jax.Array | None = None,
) -> jax.Array:
    """Sum up what training minimises, for :func:`jaxmoo.resolved_value_and_grad`.

    Divided by the language's target tokens it is `language_loss`.

    Args:
      model: the decoder.
      batch: see `token_nll`; the examples that this device holds.
      router_coef: see `language_loss`.
      scale_B: what each row's losses are multiplied by, the same for all rows of a language;
        by default 1.

    Returns:
      A scalar in nats, this device's part of the sum.

    Raises:
      ConfigError: when S exceeds the model's longest sequence, or there is a coefficient and no
        layer has experts.
    """
    nll, router = _nll_and_router_loss(model, batch, router_coef)
    if router is not None:
        # Divided by the language's target tokens, as the sum is.
        router = router_coef * sum_over_examples(target_mask(batch).sum()) * router
    if scale_B is not None:
        nll = nll * scale_B[:, None]
        router = None if router is None else router * scale_B[0]
    return nll.sum() if router is None else nll.sum() + router


def router_loss(loads: Sequence[Load]) -> jax.Array:
    """How unevenly tokens are spread over the experts.

    It is E times the sum over the experts of the share of tokens that read one and of the router's
    mean probability for it, over all layers with experts. It is k, the number of experts that a
    token reads, where all experts are read alike. The shares have no gradient, the probabilities
    have.

    Fedus et al., *Switch Transformers*, `arXiv:2101.03961 <https://arxiv.org/abs/2101.03961>`_,
    equations 4 to 6.

    Args:
      loads: what is asked of the experts, of stacks of layers.

    Returns:
      A scalar; within :func:`jaxmoo.resolved_value_and_grad` this device's part of it.

    Raises:
      ConfigError: there are no loads.
    """
    if not loads:
        raise ConfigError(
            "A router's loss was asked for of a model none of whose layers has experts. Set its "
            "coefficient to 0."
        )
    chosen_E = jnp.concatenate([load.chosen_E for load in loads]).sum(0)
    probability_E = jnp.concatenate([load.probability_E for load in loads]).sum(0)
    tokens = jnp.concatenate([load.tokens for load in loads]).sum()
    chosen_E, tokens = sum_over_examples((chosen_E, tokens))
    tokens = jnp.maximum(tokens, 1)
    return len(chosen_E) * jnp.vdot(chosen_E / tokens, probability_E / tokens)


def _nll_and_router_loss(
    model: Decoder, batch: Mapping[str, jax.Array], coef: float, chunk: int | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """`token_nll`, and unless its coefficient is 0 this device's part of the `router_loss`.

    The tokens that count are those up to a row's last target: all that its targets depend on.
    """
    counted = None
    if coef != 0:
        counted = jax.lax.cummax(target_mask(batch).astype(jnp.int32), axis=1, reverse=True) > 0
    tokens = batch["tokens"]
    h_BSD, residuals, loads = model.hidden_and_loads(
        tokens,
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        counted=counted,
    )
    targets = jnp.where(target_mask(batch), tokens, -1)[:, 1:]
    nll = front_nll(model, h_BSD[:, :-1], targets, chunk, residuals)
    nll = jnp.pad(nll, ((0, 0), (1, 0)))
    return nll, None if counted is None else router_loss(loads)


def front_nll(
    model: Decoder,
    h_BSD: jax.Array,
    targets: jax.Array,
    chunk: int | None = None,
    residuals: vocabulary.HeadResiduals | None = None,
) -> jax.Array:
    """Apply the head to the positions that predict a target.

    Args:
      model: the decoder.
      h_BSD: hidden states after the final norm.
      targets: int32 [B, S], the token that each of them predicts, or -1.
      chunk: see `token_nll`.
      residuals: of the tokens' lookup, where the engine made some.

    Returns:
      float32 [B, S]: the targets' negative log-likelihood in nats, 0 where there is none.
    """
    rows, columns = targets.shape
    if chunk is None:
        at_most = max(32, vocabulary.logits_at_once() // model.config.vocab_size)
        chunk = -(-min(max(32, rows * columns // 8), at_most) // rows)
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
    front = vocabulary.nll(
        model.head_table(), front_h, front_targets, chunk, residuals, model.logits_form
    )
    front = front[:, :columns]
    return jnp.put_along_axis(jnp.zeros_like(front), order, front, axis=1, inplace=False)


def language_loss(
    model: Decoder,
    batch: Mapping[str, jax.Array],
    *,
    chunk: int | None = None,
    router_coef: float = 0.0,
) -> jax.Array:
    """Mean negative log-likelihood per target token over one language's whole batch.

    Args:
      model: the decoder.
      batch: see `token_nll`.
      chunk: see `token_nll`.
      router_coef: how much of the `router_loss` of the language's tokens is added.

    Returns:
      float32 scalar in nats; 0 when the batch has no target.

    Raises:
      ConfigError: as `summed_loss`.
    """
    nll, router = _nll_and_router_loss(model, batch, router_coef, chunk)
    loss = nll.sum() / jnp.maximum(target_mask(batch).sum(), 1)
    return loss if router is None else loss + router_coef * router
