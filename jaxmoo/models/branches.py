"""Likelihoods of several continuations of one prompt, which is read once.

A row holds the prompt, then every continuation. Each sees the prompt and itself, and its positions
follow the prompt's, so that every number is what it would be in a row of its own.

Shape suffixes: B rows, S slots of a row, T slots that are attended to, D hidden.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmoo.models.decoder import Decoder
from jaxmoo.models.layers import DecoderLayer, Place
from jaxmoo.models.loop import check_context, over_layers
from jaxmoo.models.loss import front_nll

__all__ = ["branch_nll"]


def branch_nll(model: Decoder, tokens_BS: jax.Array, branch_BS: jax.Array) -> jax.Array:
    """Negative log-likelihood of the tokens of continuations, in nats.

    Args:
      model: the decoder.
      tokens_BS: int32 [B, S]: the prompt, its continuations one after the other, padding.
      branch_BS: int32 [B, S]: 0 for the prompt, 1, 2, ... for the continuations, -1 for padding.

    Returns:
      float32 [B, S]; 0 for the prompt and padding.

    Example:
      >>> from flax import nnx
      >>> from jaxmoo.models import DecoderConfig, token_nll
      >>> config = DecoderConfig(
      ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
      ...     num_attention_heads=4, num_key_value_heads=2, head_dim=8,
      ...     max_position_embeddings=128)
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> both = branch_nll(model, jnp.array([[5, 6, 7, 8]]), jnp.array([[0, 0, 1, 2]]))
      >>> alone = token_nll(model, {"tokens": jnp.array([[5, 6, 8]]),
      ...                           "loss_mask": jnp.array([[False, False, True]])})
      >>> abs(float(both[0, 3] - alone[0, 2])) < 1e-5
      True
    """
    check_context(model.config, tokens_BS.shape[1])
    slots_S = jnp.arange(tokens_BS.shape[1])
    prompt_B1 = (branch_BS == 0).sum(1, keepdims=True)
    first_BS = branch_BS != jnp.pad(branch_BS[:, :-1], ((0, 0), (1, 0)))
    start_BS = jax.lax.cummax(jnp.where(first_BS, slots_S, 0), axis=1)
    position_BS = jnp.where(branch_BS == 0, slots_S, prompt_B1 + slots_S - start_BS)
    seen_BST = (branch_BS[:, None, :] == 0) | (branch_BS[:, None, :] == branch_BS[:, :, None])
    seen_BST &= slots_S <= slots_S[:, None]
    distance_BST = position_BS[:, :, None] - position_BS[:, None, :]

    def body(layer: DecoderLayer, place: Place, h_BSD: jax.Array) -> tuple[jax.Array, None]:
        mask_BST = place.near(seen_BST, distance_BST)
        out = layer.self_attn.attend_where(*layer.project(h_BSD, place), mask_BST)
        return layer.finish(h_BSD, out), None

    h_BSD, _ = over_layers(model, position_BS, body, model.embed(tokens_BS))
    h_BSD = model.norm(h_BSD)
    # A continuation's first token is predicted by the prompt's last.
    previous_BS = jnp.where(first_BS, prompt_B1 - 1, slots_S - 1)
    before_BSD = jnp.take_along_axis(h_BSD, previous_BS[..., None], axis=1)
    return front_nll(model, before_BSD, jnp.where(branch_BS > 0, tokens_BS, -1))
