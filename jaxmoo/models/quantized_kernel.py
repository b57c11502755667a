"""What stands in the place of a frozen kernel that is held in few bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoo.kernels.quantized import dequantize, matrix_shape, quantized_product

__all__ = ["QuantizedKernel", "is_quantized_part", "parameters_in"]


class QuantizedKernel(nnx.Module):
    """A kernel [in, out], or a stack of them, in 4 or 8 bits per weight; it is not trained.

    Its leaves are ``kernel.codes`` and ``kernel.scales``; see
    :func:`jaxmoo.kernels.quantized.quantized_spec`.

    Args:
      codes: of all weights.
      scales: of blocks of them.
      dtype: dtype of the kernel that it stands for.
    """

    def __init__(self, codes: Any, scales: Any, dtype: Any):
        self.codes, self.scales = nnx.Param(codes), nnx.Param(scales)
        self.dtype = jnp.dtype(dtype)

    @property
    def parts(self) -> tuple[jax.Array, jax.Array]:
        """Codes and scales."""
        return self.codes.get_value(), self.scales.get_value()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return matrix_shape(self.codes)

    def matrix(self, platform: str) -> jax.Array:
        """The kernel in float32; ``platform`` is the kind of devices."""
        return dequantize(*self.parts, platform)

    def times(self, x: jax.Array, platform: str, of: jax.Array | None = None) -> jax.Array:
        """Return ``x @ kernel`` in the dtype of x.

        Args:
          x: activations; for a stack of kernels rows in bins, [N, R, in].
          platform: the kind of devices.
          of: int [N], which kernel of a stack each bin is for.
        """
        return quantized_product(x, *self.parts, platform, of)


def is_quantized_part(path: Sequence[Any]) -> bool:
    """Whether a leaf of a model's state, by its path, is codes or scales."""
    return len(path) > 1 and path[-2] == "kernel"


def parameters_in(path: Sequence[Any], leaf: Any) -> int:
    """Count the parameters of a model that a leaf of its state holds.

    Args:
      path: the leaf's path in the NNX state.
      leaf: anything with a shape and dtype.
    """
    if not is_quantized_part(path):
        return math.prod(leaf.shape)
    return 0 if path[-1] == "scales" else math.prod(matrix_shape(leaf))
