"""A vmap for kernels, which know only one batch axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

__all__ = ["folded"]


def folded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function of arrays [B, ...] a vmap that calls it with a larger batch.

    Args:
      function: of arrays, to a pytree of arrays, all [B, ...].

    Returns:
      The same function. Mapped, it is called once: the axis that ``vmap`` adds is folded into B.

    Example:
      >>> jax.vmap(folded(lambda x: x + x.shape[0]))(jnp.zeros((2, 3))).tolist()
      [[6.0, 6.0, 6.0], [6.0, 6.0, 6.0]]
    """
    call = custom_vmap(function)

    @call.def_vmap
    def rule(size: int, batched: Any, *arrays: Any) -> Any:
        def fold(x: jax.Array, is_batched: bool) -> jax.Array:
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = call(*jax.tree.map(fold, arrays, tuple(batched)))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return call
