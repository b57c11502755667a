"""What happens inside a decoder: hidden states and MLP gates, summed up layer by layer.

Only sums leave a layer, so that a corpus can be measured without keeping its activations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoo.models.decoder import Decoder
from jaxmoo.models.experts import Experts
from jaxmoo.models.layers import DecoderLayer, Place
from jaxmoo.models.loop import over_layers

__all__ = ["LayerStatistics", "layer_statistics"]


class LayerStatistics(NamedTuple):
    """Statistics of B rows of text in a decoder of L layers of width D and MLP width F."""

    pooled_LBD: jax.Array  # float32 [L + 1, B, D]: mean residual stream after 0 ... L layers
    active_LBF: jax.Array  # int32 [L, B, F]: in how many tokens the neuron's gate is positive


def layer_statistics(model: Decoder, tokens: jax.Array, mask: jax.Array) -> LayerStatistics:
    """Run a decoder's layers and sum up what each of them does.

    Args:
      model: the decoder.
      tokens: int32 [B, S], padded on the right.
      mask: bool [B, S]: the tokens that count; at least one per row. All tokens are read.

    Returns:
      The residual stream averaged over the tokens that count, before the first layer and after
      each (without the final norm), and the number of these tokens in which a neuron is active:
      the MLP's activation is above 0, for SiLU where the gate is. Of a model with experts, no
      neurons.

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

    def active(layer: DecoderLayer, x_BSD: jax.Array) -> jax.Array:
        if model.config.num_experts or isinstance(layer.mlp, Experts):
            return jnp.zeros((*mask.shape, 0), bool)
        return layer.mlp.active(x_BSD) & mask[..., None]

    def body(layer: DecoderLayer, place: Place, h_BSD: jax.Array) -> tuple[jax.Array, Any]:
        out = layer.attend(h_BSD, place)
        h_BSD, x_BSD = layer.before_mlp(h_BSD, out)
        gates = active(layer, x_BSD)
        h_BSD = layer.after_mlp(h_BSD, layer.mlp(x_BSD))
        return h_BSD, (pool(h_BSD), gates.sum(1, dtype=jnp.int32))

    h_BSD = model.embed(tokens)
    _, left = over_layers(model, jnp.arange(tokens.shape[-1]), body, h_BSD)
    means, counts = zip(*left, strict=True)
    return LayerStatistics(jnp.concatenate([pool(h_BSD)[None], *means]), jnp.concatenate(counts))
