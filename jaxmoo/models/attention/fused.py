"""What makes a kernel of attention safe under vmap and for gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxmoo.kernels.folded import folded

__all__ = ["fused"]


def fused(
    kernel: Callable[..., jax.Array],
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> Callable[..., jax.Array]:
    """Make a kernel safe under vmap, where kernels know only one batch axis, and for gradients.

    ``kernel`` takes ``(*tables, q, k, v, segment_ids)``; ``wrap`` is applied to functions of these,
    and supplies the tables. The axis that vmap adds (languages) is folded into the batch, forward
    and backward. The backward pass keeps the kernel's inputs, and computes what else the kernel
    needs again.
    """

    def vjp(*args: Any) -> Any:
        *tables, q, k, v, segment_ids = args
        return jax.vjp(lambda *qkv: kernel(*tables, *qkv, segment_ids), q, k, v)

    def forward(*args: Any) -> jax.Array:
        # The same call as in `gradients`: where a layer is recomputed, the compiler merges them.
        return vjp(*args)[0]

    def gradients(*args: Any) -> Any:
        *primals, g = args
        return vjp(*primals)[1](g)

    whole, whole_forward, whole_gradients = (
        folded(wrap(function)) for function in (kernel, forward, gradients)
    )
    attention = jax.custom_vjp(whole)
    attention.defvjp(
        lambda *inputs: (whole_forward(*inputs), inputs),
        lambda inputs, g: (*whole_gradients(*inputs, g), None),
    )
    return attention
