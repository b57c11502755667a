"""Drawing the next token: from the most likely ones, every row with random numbers of its own.

The filters are those of ``transformers`` in its order: temperature, then the K most likely tokens,
then the most likely ones that together have probability P (Holtzman et al. 2020, "nucleus"
sampling), then those not much less likely than the likeliest (Nguyen et al. 2024, "min-p").
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxmoo.errors import ConfigError

__all__ = ["Sampling", "draw", "filter_logits"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: what logits are divided by; above 0.
      top_k: draw from the so many likeliest tokens; None for all.
      top_p: draw from the likeliest tokens that together have at least this probability, at least
        one; above 0 and at most 1.
      min_p: draw from the tokens whose probability is at least this share of the likeliest one's;
        0 to 1.

    Raises:
      ConfigError: a value is out of range.

    Example:
      >>> Sampling(temperature=0.7, top_p=0.9)
      Sampling(temperature=0.7, top_k=None, top_p=0.9, min_p=None)
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigError(
                f"temperature is a number above 0, found {self.temperature}. Without sampling, the "
                "likeliest token is taken."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is a number of tokens, at least 1, found {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is a probability above 0, at most 1, found {self.top_p}.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is a number from 0 to 1, found {self.min_p}.")


def filter_logits(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Return the logits of the distribution that tokens are drawn from.

    Args:
      logits_BV: float [B, V], at least float32.
      sampling: the filters. Tokens as likely as the last one that a filter keeps are kept, too.

    Returns:
      [B, V], minus infinity for tokens that are never drawn.

    Example:
      >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
      >>> found = jax.nn.softmax(filter_logits(logits, Sampling(top_p=0.6)))
      >>> [round(float(p), 3) for p in found[0]]
      [0.625, 0.375, 0.0]
    """
    x_BV = logits_BV / sampling.temperature
    size = x_BV.shape[-1]
    if sampling.top_k is not None and sampling.top_k < size:
        least = jax.lax.top_k(x_BV, sampling.top_k)[0][:, -1:]
        x_BV = _keep(x_BV, least)
    if sampling.top_p is not None and sampling.top_p < 1:
        ascending = jnp.sort(x_BV, axis=-1)
        below = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
        kept = (below > 1 - sampling.top_p).at[:, -1].set(True)
        first = jnp.argmax(kept, axis=-1, keepdims=True)
        x_BV = _keep(x_BV, jnp.take_along_axis(ascending, first, axis=-1))
    if sampling.min_p:
        x_BV = _keep(x_BV, x_BV.max(-1, keepdims=True) + math.log(sampling.min_p))
    return x_BV


def _keep(x_BV: jax.Array, least: jax.Array) -> jax.Array:
    return jnp.where(x_BV < least, -jnp.inf, x_BV)


def draw(
    logits_BV: jax.Array, sampling: Sampling, seed: jax.Array, rows_B: jax.Array, number: jax.Array
) -> jax.Array:
    """Draw a token per row.

    Args:
      logits_BV: float [B, V].
      sampling: what to draw from.
      seed: int32 [], of all that is drawn.
      rows_B: int32 [B], a row's number. What is drawn for a row depends on it, not on the row's
        place nor on the other rows.
      number: int32 [], the token's number in the reply.

    Returns:
      int32 [B].
    """
    key = jax.random.key(seed)

    def one(logits_V: jax.Array, row: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, row), number)
        return jax.random.categorical(own, logits_V)

    return jax.vmap(one)(filter_logits(logits_BV, sampling), rows_B).astype(jnp.int32)
