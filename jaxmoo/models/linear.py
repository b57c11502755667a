"""A linear map, the part that projections, routers and adapters are made of."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoo.kernels.bin_product import bin_product
from jaxmoo.kernels.product import product
from jaxmoo.models.quantized_kernel import QuantizedKernel

__all__ = ["Linear"]

_normal = jax.nn.initializers.normal(0.02)


class Linear(nnx.Module):
    """x @ kernel (+ bias), computed in ``dtype``; or a stack of such maps, without biases."""

    def __init__(
        self,
        size_in: int,
        size_out: int,
        *,
        stack: tuple[int, ...] = (),
        bias: bool = False,
        platform: str,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.platform = platform
        self.dtype = dtype
        self.kernel: nnx.Param[Any] | QuantizedKernel = nnx.Param(
            _normal(rngs.params(), (*stack, size_in, size_out), param_dtype)
        )
        self.bias = nnx.Param(jnp.zeros((*stack, size_out), param_dtype)) if bias else None

    def __call__(self, x: jax.Array, of: jax.Array | None = None) -> jax.Array:
        """Map the last axis: ``[..., in] -> [..., out]``.

        Args:
          x: activations; for a stack of maps rows in bins, [N, R, in].
          of: int [N], which map of a stack each bin is for.
        """
        y = self.times_kernel(x, of)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)

    def times_kernel(self, x: jax.Array, of: jax.Array | None = None) -> jax.Array:
        """``x @ kernel``, without a bias; arguments are those of a call."""
        if isinstance(self.kernel, QuantizedKernel):
            return self.kernel.times(x, self.platform, of)
        kernel = self.kernel[...].astype(self.dtype)
        if of is not None:
            return bin_product(x, kernel, of)
        return product(x, kernel, self.platform)

    def matrix(self) -> jax.Array:
        """The kernel, or in float32 what it stands for if it is quantised."""
        if isinstance(self.kernel, QuantizedKernel):
            return self.kernel.matrix(self.platform)
        return self.kernel[...]
