"""The loop over a decoder's layers: the same for training, generation, branches and probes.

Layers of one shape lie in one stack and are scanned over, whatever their kinds: the loop hands each
its rotary positions and its window. Where a stack's layers differ in these, the number of a layer's
kind is scanned over with its parameters, so that one compiled body serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoo.engine.block import block
from jaxmoo.errors import ConfigError
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.attention import Windows
from jaxmoo.models.layers import DecoderLayer, Place
from jaxmoo.models.rope import LongRope, Rope, angle_tables

__all__ = ["check_context", "over_layers"]

Carry = TypeVar("Carry")
# From a layer, its place and what is carried to what is carried on, and what the layer leaves.
Body = Callable[[DecoderLayer, Place, Any], tuple[Any, Any]]


def over_layers(
    model: Any,
    positions: jax.Array,
    body: Body,
    carry: Carry,
    *,
    segment_ids: jax.Array | None = None,
    remat: str | None = None,
) -> tuple[Carry, list[Any]]:
    """Run a decoder's layers, one after the other.

    Args:
      model: the :class:`~jaxmoo.models.Decoder`.
      positions: int32 [..., S], of the tokens.
      body: called as ``body(layer, place, carry)``; returns the next carry and anything.
      carry: arrays that go from layer to layer, such as the residual stream.
      segment_ids: int32 [..., S], where several texts are packed in a row.
      remat: makes every call a block (:func:`jaxmoo.block`); None: it is none.

    Returns:
      The last carry, and for each segment what its layers left, stacked.
    """
    places, left = _Places(model.config, positions, segment_ids), []
    for first, end in model.spans:
        segment = model.layers[str(first)]
        carry, some = _scan(segment, places, places.numbers[first:end], body, carry, remat)
        left.append(some)
    return carry, left


def check_context(config: DecoderConfig, length: int) -> None:
    """Raise unless all texts of up to so many tokens have the same rotary frequencies.

    Keys that lie in a cache, or belong to several texts, cannot change with a text's length.

    Raises:
      ConfigError: longer ones have others (LongRoPE).
    """
    for kind in dict.fromkeys(config.kinds):
        scaling = None if kind.rope is None else kind.rope.scaling
        if isinstance(scaling, LongRope) and length > scaling.original_max_position_embeddings:
            raise ConfigError(
                f"{length} tokens in all: beyond {scaling.original_max_position_embeddings}, this "
                "model has other rotary frequencies (longrope), and generating across that bound, "
                "or scoring several texts with a common beginning, is not supported. Use shorter "
                "texts."
            )


def _scan(
    segment: DecoderLayer,
    places: _Places,
    numbers: tuple[int, ...],
    body: Body,
    carry: Any,
    remat: str | None,
) -> tuple[Any, Any]:
    graphdef, stacked = nnx.split(segment)
    alike = len(set(numbers)) == 1

    def layer(params: nnx.State, carry: Any, number: jax.Array | None) -> tuple[Any, Any]:
        place = places.of(numbers[0] if number is None else number)
        return body(nnx.merge(graphdef, params), place, carry)

    call = layer if remat is None else block(layer, remat=remat)

    def step(carry: Any, xs: Any) -> tuple[Any, Any]:
        params, number = xs
        return call(params, carry, number)

    which = None if alike else jnp.asarray(numbers, jnp.int32)
    return jax.lax.scan(step, carry, (stacked, which))


class _Places:
    """The places of a model's layers: rotary positions and windows, by kind."""

    def __init__(self, config: DecoderConfig, positions: jax.Array, segment_ids: jax.Array | None):
        self.kinds = list(dict.fromkeys(config.kinds))
        self.numbers = tuple(self.kinds.index(kind) for kind in config.kinds)
        ropes = dict.fromkeys(kind.rope for kind in self.kinds if kind.rope is not None)
        width = config.rotary_width
        self.tables: dict[Rope | None, Any] = {
            rope: angle_tables(rope, width, positions, segment_ids) for rope in ropes
        }
        self.stacked: list[jax.Array] = []
        if len({kind.rope for kind in self.kinds}) > 1:
            # No rotation is one by no angle.
            still = jnp.zeros((*positions.shape, width // 2))
            both = [self.tables.get(kind.rope, (still + 1, still)) for kind in self.kinds]
            for xs in zip(*both, strict=True):
                self.stacked.append(jnp.stack(jnp.broadcast_arrays(*xs)))

    def of(self, number: int | jax.Array) -> Place:
        """The place of a layer of a kind, whose number is known or traced."""
        if isinstance(number, int):
            kind = self.kinds[number]
            cos, sin = self.tables.get(kind.rope, (None, None))
            return Place(cos, sin, kind.window)
        if not self.stacked:
            cos, sin = self.tables.get(self.kinds[0].rope, (None, None))
        else:
            cos, sin = (
                jax.lax.dynamic_index_in_dim(x, number, keepdims=False) for x in self.stacked
            )
        windows = tuple(kind.window for kind in self.kinds)
        if len(set(windows)) == 1:
            return Place(cos, sin, windows[0])
        return Place(cos, sin, Windows(windows, number))
