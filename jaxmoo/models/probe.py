"""What happens inside a decoder: hidden states and MLP gates, summed up layer by layer.

Only sums leave a layer, so that a corpus can be measured without keeping its activations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.decoder import Decoder
from jaxmoo.models.layers import DecoderLayer, Place
from jaxmoo.models.loop import over_layers

__all__ = ["LayerStatistics", "layer_statistics", "neurons_per_layer"]


class LayerStatistics(NamedTuple):
    """Statistics of B rows of text in a decoder of L layers of width D and MLP width F."""

    pooled_LBD: jax.Array  # float32 [L + 1, B, D]: mean residual stream after 0 ... L layers
    active_LBF: jax.Array  # int32 [L, B, F]: in how many tokens the neuron's gate is positive


def neurons_per_layer(config: DecoderConfig) -> int:
    """How many neurons a layer's MLP has, or its experts have together.

    Returns:
      The number; 0 where it is not the same in all layers, of which some have experts.
    """
    if not config.num_experts:
        return config.intermediate_size
    return 0 if config.dense_layers else config.num_experts * config.moe_intermediate_size


def layer_statistics(model: Decoder, tokens: jax.Array, mask: jax.Array) -> LayerStatistics:
    """Run a decoder's layers and sum up what each of them does.

    Args:
      model: the decoder.
      tokens: int32 [B, S], padded on the right.
      mask: bool [B, S]: the tokens that count; at least one per row. All tokens are read.

    Returns:
      The residual stream averaged over the tokens that count, before the first layer and after
      each (without the final norm), and the number of these tokens in which a neuron is active:
      the MLP's activation is above 0, for SiLU where the gate is. Of experts, all neurons of one
      come before those of the next.

    Example:
      >>> from flax import nnx
      >>> from jaxmoo.models import DecoderConfig
      >>> config = DecoderConfig(
      ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
      ...     num_attention_heads=4, num_key_value_heads=2, head_dim=8,
      ...     max_position_embeddings=128)
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> found = layer_statistics(model, jnp.zeros((3, 5), jnp.int32), jnp.ones((3, 5), bool))
      >>> found.pooled_LBD.shape, found.active_LBF.shape
      ((3, 3, 16), (2, 3, 32))
    """
    counted = mask.astype(jnp.float32)
    share = counted / counted.sum(1, keepdims=True)

    def pool(h_BSD: jax.Array) -> jax.Array:
        return jnp.einsum(
            "bsd,bs->bd", h_BSD.astype(jnp.float32), share, precision=jax.lax.Precision.HIGHEST
        )

    width = neurons_per_layer(model.config)

    def active(layer: DecoderLayer, x_BSD: jax.Array) -> jax.Array:
        if width == 0:
            return jnp.zeros((len(mask), 0), jnp.int32)
        return layer.mlp.count_active(x_BSD, mask)

    def body(layer: DecoderLayer, place: Place, h_BSD: jax.Array) -> tuple[jax.Array, Any]:
        out = layer.attend(h_BSD, place)
        h_BSD, x_BSD = layer.before_mlp(h_BSD, out)
        gates_BF = active(layer, x_BSD)
        h_BSD = layer.after_mlp(h_BSD, layer.mlp(x_BSD))
        return h_BSD, (pool(h_BSD), gates_BF)

    h_BSD = model.embed(tokens)
    _, left = over_layers(model, jnp.arange(tokens.shape[-1]), body, h_BSD)
    means, counts = zip(*left, strict=True)
    return LayerStatistics(jnp.concatenate([pool(h_BSD)[None], *means]), jnp.concatenate(counts))
