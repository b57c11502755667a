"""Which precision a step is computed in."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

__all__ = ["at_least_float32"]


def at_least_float32(dtype: Any) -> Any:
    """The dtype for steps that half precision would spoil.

    Example:
      >>> at_least_float32(jnp.bfloat16), at_least_float32(jnp.float32)
      (dtype('float32'), dtype('float32'))
    """
    return jnp.promote_types(dtype, jnp.float32)
