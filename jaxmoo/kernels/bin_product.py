"""Products of rows in bins, each with the matrix that its bin is of: one of a stack of matrices.

Shape suffixes: N bins, R rows of a bin, E matrices, I and O their sides.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["bin_product"]


@jax.custom_vjp
def bin_product(x_NRI: jax.Array, kernel_EIO: jax.Array, of_N: jax.Array) -> jax.Array:
    """Multiply the rows of every bin by the matrix that the bin is of.

    The copies of matrices, one for each bin, are made anew for the backward pass, in which they
    would otherwise be kept of all layers. Gradients of a matrix's bins are added up by a product.
    Adding them one by one to where they belong would be in another order every time on a GPU.

    Args:
      x_NRI: rows.
      kernel_EIO: matrices, of the same dtype.
      of_N: int, the number of the matrix that a bin is of.

    Returns:
      [N, R, O].

    Example:
      >>> x, kernels = jnp.ones((3, 2, 1)), jnp.array([[[5.0]], [[7.0]]])
      >>> bin_product(x, kernels, jnp.array([0, 1, 1])).tolist()
      [[[5.0], [5.0]], [[7.0], [7.0]], [[7.0], [7.0]]]
    """
    return jnp.einsum("nri,nio->nro", x_NRI, kernel_EIO[of_N])


def _forward(
    x_NRI: jax.Array, kernel_EIO: jax.Array, of_N: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return bin_product(x_NRI, kernel_EIO, of_N), (x_NRI, kernel_EIO, of_N)


def _backward(
    residuals: tuple[jax.Array, ...], ct_NRO: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_NRI, kernel_EIO, of_N = residuals
    ct_x_NRI = jnp.einsum("nro,nio->nri", ct_NRO, kernel_EIO[of_N])
    is_of_EN = (of_N == jnp.arange(len(kernel_EIO))[:, None]).astype(ct_NRO.dtype)
    ct_NIO = jnp.einsum("nri,nro->nio", x_NRI, ct_NRO)
    return ct_x_NRI, jnp.einsum("en,nio->eio", is_of_EN, ct_NIO), None


bin_product.defvjp(_forward, _backward)
