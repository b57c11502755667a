"""Products of activations and weights, written as every kind of device computes them fast.

- GPUs: the leading axes of the activations, rows and positions, are made one. XLA's GPU compiler
  transposes all activations in memory before it contracts two axes at once, which the gradient of
  the weight would.
- CPUs, in half precision: see :mod:`~jaxmoo.kernels.cpu_product`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmoo.kernels.cpu_product import half_product

__all__ = ["product"]


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply the last axis of activations by a matrix.

    Args:
      x: [..., I].
      kernel: [I, O], of the same dtype.

    Returns:
      [..., O] in the same dtype; sums are formed in float32 at least.

    Example:
      >>> product(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 1), jnp.bfloat16)).ravel()
      Array([3, 3], dtype=bfloat16)
    """
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        return half_product(x, kernel)
    if jax.default_backend() == "gpu":
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])
    return x @ kernel
