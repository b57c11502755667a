"""Products of activations and weights, written as every kind of device computes them fast.

- GPUs: the leading axes of the activations, rows and positions, are made one. XLA's GPU compiler
  transposes all activations in memory before it contracts two axes at once, which the gradient of
  the weight would.
- CPUs, in half precision: see :mod:`~jaxmoo.kernels.cpu_product`.
- TPUs: see :func:`exchanging`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoo.kernels.cpu_product import half_product
from jaxmoo.platforms import like_gpu

__all__ = ["exchanging", "product"]

_pieces: contextvars.ContextVar[int] = contextvars.ContextVar("pieces", default=1)


@contextlib.contextmanager
def exchanging(pieces: int) -> Iterator[None]:
    """Say that devices exchange the gradients of the weights in products traced meanwhile.

    A device that has the gradients of several languages sends to each other device a piece of all
    of them. XLA's compiler for TPUs chooses the order of a product's axes in memory, so if pieces
    are an axis of the product the gradients need not be copied before they are sent.

    Args:
      pieces: into how many a weight's gradient is cut along its first axis, if that divides.
    """
    token = _pieces.set(pieces)
    try:
        yield
    finally:
        _pieces.reset(token)


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
    pieces = _pieces.get()
    if pieces > 1 and kernel.shape[0] % pieces == 0:
        return _in_pieces(x, kernel, pieces)
    if x.dtype == jnp.bfloat16 and platform == "cpu":
        return half_product(x, kernel)
    if like_gpu(platform):
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])
    return x @ kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _in_pieces(x: jax.Array, kernel: jax.Array, pieces: int) -> jax.Array:
    del pieces
    return x @ kernel


def _forward(x: jax.Array, kernel: jax.Array, pieces: int) -> tuple[jax.Array, Any]:
    del pieces
    return x @ kernel, (x, kernel)


def _backward(pieces: int, inputs: Any, ct: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = inputs
    size_in, size_out = kernel.shape
    x_NPI, ct_NO = x.reshape(-1, pieces, size_in // pieces), ct.reshape(-1, size_out)
    dkernel = jnp.einsum("npi,no->pio", x_NPI, ct_NO)
    return ct @ kernel.T, dkernel.reshape(kernel.shape)


_in_pieces.defvjp(_forward, _backward)
