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


def product(x: jax.Array, kernel: jax.Array, platform: str) -> jax.Array:
    """Multiply the last axis of activations by a matrix.

    Args:
      x: [..., I].
      kernel: [I, O], of the same dtype.
      platform: the kind of devices, from :func:`jaxmoo.platforms.platform_of`.

    Returns:
      [..., O] in the same dtype; sums are formed in float32 at least.

    Example:
      >>> product(jnp.ones((2, 3)), jnp.ones((3, 1)), "cpu").ravel().tolist()
      [3.0, 3.0]
    """
    if x.dtype == jnp.bfloat16 and platform == "cpu":
        return half_product(x, kernel)
    if platform == "gpu":
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])
    return x @ kernel
