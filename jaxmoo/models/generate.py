"""Generation with a cache of keys and values.

The cache has one slot per token. The prompts of a batch, padded on the right, fill slots
0 ... P - 1; the i-th generated token of every row goes to slot P + i, so that one write serves all
rows. A token's position in its text is the number of slots before it that hold no padding.

Shape suffixes: B rows, P slots of the prompts, N generated tokens, S tokens of one pass, T slots of
the cache, L layers of a segment, D hidden, G key/value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmoo.errors import ConfigError
from jaxmoo.models.decoder import Decoder
from jaxmoo.models.layers import DecoderLayer, Place
from jaxmoo.models.loop import check_context, over_layers
from jaxmoo.models.sampling import Sampling, draw

__all__ = ["generate"]


class _Slots(NamedTuple):
    """What lies where in the cache."""

    position_BT: jax.Array
    filled_BT: jax.Array  # false for padding; slots after the last token are masked as future


def generate(
    model: Decoder,
    prompts_BP: jax.Array,
    lengths_B: jax.Array,
    *,
    new_tokens: int,
    stop: Sequence[int] | jax.Array,
    pad_id: int = 0,
    sampling: Sampling | None = None,
    seed: int | jax.Array = 0,
    rows_B: jax.Array | None = None,
) -> jax.Array:
    """Continue every prompt token by token: by the likeliest, or by one that is drawn.

    Args:
      model: the decoder.
      prompts_BP: int32 [B, P], padded on the right with anything.
      lengths_B: int32 [B], tokens of each prompt, at least 1.
      new_tokens: N, the most tokens to generate. The loop ends when every row has stopped.
      stop: a row ends with the first of these tokens, which is its last; for all rows, or int32
        [B, ...] for each its own, -1 where it has fewer.
      pad_id: what follows it.
      sampling: what tokens are drawn from; None takes the likeliest.
      seed: of all that is drawn.
      rows_B: int32 [B], a number per row, by which it is drawn for; see
        `jaxmoo.models.sampling.draw`. 0 ... B - 1 by default.

    Returns:
      int32 [B, N].

    Raises:
      ConfigError: when P + N exceeds the model's longest sequence, or N is not positive.

    Example:
      >>> from flax import nnx
      >>> from jaxmoo.models import DecoderConfig
      >>> config = DecoderConfig(
      ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
      ...     num_attention_heads=4, num_key_value_heads=2, head_dim=8,
      ...     max_position_embeddings=128)
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> prompts, lengths = jnp.array([[5, 6, 7], [8, 0, 0]]), jnp.array([3, 1])
      >>> jax.jit(lambda *x: generate(model, *x, new_tokens=4, stop=[]))(prompts, lengths).shape
      (2, 4)
    """
    rows, length = prompts_BP.shape
    limit = model.config.max_position_embeddings
    if new_tokens < 1 or length + new_tokens > limit:
        raise ConfigError(
            f"{new_tokens} new tokens after prompts of up to {length}: expected at least 1, and "
            f"at most {limit} in all, the longest sequence of the model."
        )
    check_context(model.config, length + new_tokens)
    # The last token is never read again.
    slots_T = jnp.arange(length + new_tokens - 1)
    slots = _Slots(
        jnp.where(slots_T < length, slots_T, lengths_B[:, None] + slots_T - length),
        (slots_T < lengths_B[:, None]) | (slots_T >= length),
    )
    stop_BS = stop if isinstance(stop, jax.Array) else jnp.asarray([tuple(stop)], jnp.int32)
    numbers_B = jnp.arange(rows) if rows_B is None else rows_B

    def next_token(hidden_B1D: jax.Array, number: jax.Array) -> jax.Array:
        logits_BV = model.logits(hidden_B1D[:, 0])
        if sampling is None:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return draw(logits_BV, sampling, jnp.asarray(seed), numbers_B, number)

    def stops(token_B: jax.Array) -> jax.Array:
        return (token_B[:, None] == stop_BS).any(-1)

    hidden_BPD, cache = _run(model, prompts_BP, jnp.int32(0), slots, _empty_cache(model, slots))
    last_B1D = jnp.take_along_axis(hidden_BPD, (lengths_B - 1)[:, None, None], axis=1)
    first_B = next_token(last_B1D, jnp.int32(0))
    out_BN = jnp.full((rows, new_tokens), pad_id, jnp.int32).at[:, 0].set(first_B)

    def goes_on(carry: tuple) -> jax.Array:
        made, _, done_B, _ = carry
        return (made < new_tokens) & ~done_B.all()

    def step(carry: tuple) -> tuple:
        made, out_BN, done_B, cache = carry
        last_B1 = jax.lax.dynamic_slice_in_dim(out_BN, made - 1, 1, 1)
        hidden_B1D, cache = _run(model, last_B1, length + made - 1, slots, cache)
        token_B = jnp.where(done_B, pad_id, next_token(hidden_B1D, made))
        out_BN = jax.lax.dynamic_update_slice_in_dim(out_BN, token_B[:, None], made, 1)
        return made + 1, out_BN, done_B | stops(token_B), cache

    start = (jnp.int32(1), out_BN, stops(first_B), cache)
    return jax.lax.while_loop(goes_on, step, start)[1]


def _empty_cache(model: Decoder, slots: _Slots) -> tuple[jax.Array, jax.Array]:
    """Keys and values [L, B, T, G, H] of all layers."""
    config = model.config
    heads = (config.num_key_value_heads, config.head_dim)
    shape = (config.num_hidden_layers, *slots.position_BT.shape, *heads)
    return jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype)


def _run(
    model: Decoder,
    tokens_BS: jax.Array,
    start: jax.Array,
    slots: _Slots,
    cache: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Put tokens into slots ``start`` ...; return their hidden states [B, S, D] and the cache.

    Each layer writes its keys and values in place, then reads the cache.
    """
    size = tokens_BS.shape[1]
    all_slots = jnp.arange(slots.position_BT.shape[1])
    own = start + jnp.arange(size)
    position_BS = jax.lax.dynamic_slice_in_dim(slots.position_BT, start, size, 1)
    seen_BST = slots.filled_BT[:, None, :] & (all_slots <= own[:, None])
    distance_BST = position_BS[:, :, None] - slots.position_BT[:, None, :]

    def put(cache: jax.Array, x_BSGH: jax.Array, number: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(cache, x_BSGH[None], (number, 0, start, 0, 0))

    def body(layer: DecoderLayer, place: Place, carry: tuple) -> tuple[tuple, None]:
        number, h_BSD, k_LBTGH, v_LBTGH = carry
        q, k, v = layer.project(h_BSD, place)
        k_LBTGH, v_LBTGH = put(k_LBTGH, k, number), put(v_LBTGH, v, number)
        mask_BST = place.near(seen_BST, distance_BST)
        out = layer.self_attn.attend_where(q, k_LBTGH[number], v_LBTGH[number], mask_BST)
        return (number + 1, layer.finish(h_BSD, out), k_LBTGH, v_LBTGH), None

    carry = (jnp.int32(0), model.embed(tokens_BS), *cache)
    (_, h_BSD, k_LBTGH, v_LBTGH), _ = over_layers(model, position_BS, body, carry)
    return model.norm(h_BSD), (k_LBTGH, v_LBTGH)
