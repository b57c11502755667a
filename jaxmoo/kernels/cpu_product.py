"""Products of bfloat16 matrices on XLA's CPU backend.

It turns bfloat16 into float32 first, unless the product is one of two plain matrices with a float32
result: those it gives to the processor's own bfloat16 instructions (AMX, AVX-512) if there are any,
which are several times as fast as float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

__all__ = ["half_product"]


@jax.custom_vjp
def half_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply the last axis of activations by a matrix, both in bfloat16.

    Args:
      x: bfloat16 [..., I].
      kernel: bfloat16 [I, O].

    Returns:
      bfloat16 [..., O], rounded once.

    Example:
      >>> half_product(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 1), jnp.bfloat16)).ravel()
      Array([3, 3], dtype=bfloat16)
    """
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    return half_product(x, kernel), (x, kernel)


def _backward(inputs: Any, ct: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = inputs
    dx = jnp.matmul(ct, kernel.T, preferred_element_type=jnp.float32)
    rows_NI, cts_NO = (a.reshape(-1, a.shape[-1]) for a in (x, ct))
    return dx.astype(x.dtype), _kernel_gradient(rows_NI, cts_NO).astype(kernel.dtype)


half_product.defvjp(_forward, _backward)


@custom_vmap
def _kernel_gradient(x_NI: jax.Array, ct_NO: jax.Array) -> jax.Array:
    # Without the barrier the transposition becomes part of the product, which is then a slow one.
    x_IN = jax.lax.optimization_barrier(x_NI.T)
    return jnp.matmul(x_IN, ct_NO, preferred_element_type=jnp.float32)


@_kernel_gradient.def_vmap
def _(size: int, batched: list[bool], x: jax.Array, ct: jax.Array) -> tuple[jax.Array, bool]:
    """One plain product for every language."""
    rows = ((x[i] if batched[0] else x, ct[i] if batched[1] else ct) for i in range(size))
    return jnp.stack([_kernel_gradient(*pair) for pair in rows]), True
