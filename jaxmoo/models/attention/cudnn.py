"""cuDNN's flash attention, on NVIDIA GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxmoo.errors import ConfigError
from jaxmoo.mesh import TENSOR
from jaxmoo.models.attention.fused import fused
from jaxmoo.models.attention.windows import Window, Windows, by_kind, with_kind

__all__ = ["attend", "obstacle"]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    window: Window,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """See :func:`jaxmoo.models.attention.attend`."""
    if soft_cap is not None:
        raise ConfigError("cuDNN has no attention with soft-capped scores")
    if isinstance(window, Windows):
        kernels = [functools.partial(_cudnn, window=w, scale=scale) for w in window.sizes]
        attention = fused(functools.partial(by_kind, kernels))
        segment_ids = with_kind(segment_ids, window.which, q)
    else:
        # JAX knows the kernel's derivative, which keeps what it needs, its vmap, and how to
        # divide it over heads; but of a mask not the vmap.
        attention = functools.partial(
            _cudnn if segment_ids is None else _fused_cudnn, window=window, scale=scale
        )
    return _over_heads(attention, k.shape[2])(q, k, v, segment_ids)


def obstacle(head_dim: int, dtype: np.dtype, platform: str) -> str | None:
    """Why cuDNN cannot run on a kind of devices; None if it can."""
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, and the devices are of the kind {platform!r}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, and the model's dtype is {dtype}"
    example = jax.ShapeDtypeStruct((1, 128, 1, head_dim), dtype)
    try:
        jax.eval_shape(lambda q: _cudnn(q, q, q, None, window=None), example)
    except ConfigError as error:
        return str(error)
    return None


def _over_heads(attention: Callable[..., jax.Array], num_heads: int) -> Callable[..., jax.Array]:
    """Let every device of a mesh's tensor axis compute its heads, within the engine.

    There the other axes are divided by hand, and JAX's own division of the kernel does not work.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = TENSOR in mesh.axis_names and TENSOR not in mesh.manual_axes
    if not mesh.manual_axes or not left or mesh.shape[TENSOR] == 1:
        return attention
    if num_heads % mesh.shape[TENSOR]:
        raise ConfigError(
            f"{num_heads} key/value heads cannot be divided over mesh.tensor={mesh.shape[TENSOR]} "
            "by cuDNN's attention. Set mesh.tensor to a divisor, or attention to 'xla'."
        )
    heads = P(None, None, TENSOR)
    return jax.shard_map(
        attention,
        in_specs=(heads, heads, heads, P()),
        out_specs=heads,
        axis_names={TENSOR},
        check_vma=False,
    )


def _fused_cudnn(*arrays: jax.Array, window: int | None, scale: float | None) -> jax.Array:
    return fused(functools.partial(_cudnn, window=window, scale=scale))(*arrays)


def _cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    window: int | None,
    scale: float | None = None,
) -> jax.Array:
    mask = None
    if segment_ids is not None:
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    try:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            is_causal=True,
            scale=scale,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    # What JAX raises where cuDNN is missing, or lacks the case.
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"cuDNN has no attention for {q.dtype} heads of width {q.shape[-1]} and rows of "
            f"{q.shape[1]} tokens{'' if mask is None else ', packed'}: {error}"
        ) from error
