"""A kernel with what adapters add to it, merged when it is asked for."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoo.dtypes import at_least_float32
from jaxmoo.kernels.quantized import dequantize, matrix_shape

__all__ = ["AdaptedKernel"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel", "a", "b", "scale", "magnitude"],
    meta_fields=["dtype"],
)
@dataclasses.dataclass(frozen=True)
class AdaptedKernel:
    """A kernel, or a stack of them, not merged yet with what adapters add to it.

    Attributes:
      kernel: [..., in, out], or codes and scales (:mod:`jaxmoo.kernels.quantized`).
      a: [..., in, r]; None where there are no adapters.
      b: [..., r, out].
      scale: factor of their product.
      magnitude: [..., out], the norms of the sum's columns, or None.
      dtype: dtype of the merged kernel.
    """

    kernel: Any
    a: jax.Array | None
    b: jax.Array | None
    scale: Any
    magnitude: jax.Array | None
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the merged kernel, or of the stack of them."""
        return matrix_shape(self.kernel[0]) if isinstance(self.kernel, tuple) else self.kernel.shape

    def merged(self) -> jax.Array:
        """The kernels that compute the same, on the devices where they lie."""
        # Of codes and scales, the latter have the kernel's axes.
        return _merge(jax.tree.leaves(self.kernel)[-1].sharding)(self)

    def value(self) -> jax.Array:
        """The same, to be traced: sums are formed in float32 and rounded once."""
        kernel = dequantize(*self.kernel) if isinstance(self.kernel, tuple) else self.kernel
        if self.a is None or self.b is None:
            return kernel.astype(self.dtype)
        wide = at_least_float32(kernel.dtype)
        change = self.scale * jnp.matmul(self.a, self.b, precision="highest").astype(wide)
        changed = kernel.astype(wide) + change
        if self.magnitude is not None:
            norms = jnp.linalg.norm(changed, axis=-2, keepdims=True)
            changed = changed * (self.magnitude[..., None, :] / norms)
        return changed.astype(self.dtype)


@functools.cache
def _merge(placement: Any) -> Any:
    return jax.jit(AdaptedKernel.value, out_shardings=placement)
