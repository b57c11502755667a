"""Products of activations and weights, written as every kind of device computes them fast.

- GPUs: the leading axes of the activations, rows and positions, are made one. XLA's GPU compiler
  transposes all activations in memory before it contracts two axes at once, which the gradient of
  the weight would.
- CPUs, in half precision: the CPU backend turns bfloat16 into float32 first, unless the product is
  one of two plain matrices with a float32 result: those it gives to the processor's own bfloat16
  instructions (AMX, AVX-512), which are several times as fast as float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

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
        return _on_cpu(x, kernel)
    if jax.default_backend() == "gpu":
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])
    return x @ kernel


@jax.custom_vjp
def _on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    return _on_cpu(x, kernel), (x, kernel)


def _backward(inputs: Any, ct: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = inputs
    dx = jnp.matmul(ct, kernel.T, preferred_element_type=jnp.float32)
    rows_NI, cts_NO = (a.reshape(-1, a.shape[-1]) for a in (x, ct))
    return dx.astype(x.dtype), _kernel_gradient(rows_NI, cts_NO).astype(kernel.dtype)


_on_cpu.defvjp(_forward, _backward)


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
