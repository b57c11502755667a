"""Which implementation of attention is used, and using it.

Shape suffixes: B batch, S sequence, N query heads, G key/value heads, H head width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmoo.errors import ConfigError, did_you_mean
from jaxmoo.models.attention import cudnn, plain, splash
from jaxmoo.models.attention.windows import Window
from jaxmoo.platforms import default_platform

__all__ = ["IMPLEMENTATIONS", "attend", "choose_attention"]

IMPLEMENTATIONS = ("xla", "cudnn", "tpu")


def choose_attention(
    name: str,
    *,
    head_dim: int,
    dtype: Any,
    platform: str | None = None,
    soft_cap: float | None = None,
) -> str:
    """Choose the implementation that a model uses on one kind of devices.

    Args:
      name: one of :data:`IMPLEMENTATIONS`, or "auto" for the fastest that can run there.
      head_dim: width of one head.
      dtype: dtype of the computation.
      platform: the kind, from :func:`jaxmoo.platforms.platform_of`; by default that of JAX's
        devices.
      soft_cap: see :func:`attend`.

    Returns:
      One of :data:`IMPLEMENTATIONS`.

    Raises:
      ConfigError: there is no such implementation, or it cannot run there.

    Example:
      >>> choose_attention("auto", head_dim=64, dtype=jnp.float32, platform="cpu")
      'xla'
    """
    known = ("auto", *IMPLEMENTATIONS)
    if name not in known:
        raise ConfigError(
            f"attention must be one of {', '.join(known)}, got {name!r}.{did_you_mean(name, known)}"
        )
    if name == "xla":
        return name
    checks = {"cudnn": cudnn.obstacle, "tpu": splash.obstacle}
    on = default_platform() if platform is None else platform

    def obstacle(name: str) -> str | None:
        if name == "cudnn" and soft_cap is not None:
            return "it has no soft-capped scores (attn_logit_softcapping)"
        return checks[name](head_dim, jnp.dtype(dtype), on)

    if name == "auto":
        return next((name for name in checks if obstacle(name) is None), "xla")
    found = obstacle(name)
    if found is not None:
        raise ConfigError(
            f"attention {name!r} cannot run here: {found}. Set attention to 'auto' for the best "
            "that can, or to 'xla', which always can."
        )
    return name


def attend(
    q_BSNH: jax.Array,
    k_BSGH: jax.Array,
    v_BSGH: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    window: Window = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: str = "xla",
    platform: str | None = None,
) -> jax.Array:
    """Causal self-attention; N / G consecutive query heads share a key/value head.

    Args:
      q_BSNH: queries.
      k_BSGH: keys.
      v_BSGH: values.
      segment_ids: int32 [B, S]; tokens attend only within their own segment.
      window: number of tokens that a token attends to, itself included; None for all before it.
      scale: what scores are multiplied by; None: 1 / sqrt(H).
      soft_cap: c: scores then become c tanh(score / c); None: they stay.
      implementation: one of :data:`IMPLEMENTATIONS`.
      platform: see :func:`choose_attention`. The TPU's kernel is interpreted on other kinds.

    Returns:
      [B, S, N, H] in the dtype of the queries.

    Raises:
      ConfigError: cuDNN is chosen and cannot compute this.

    Example:
      >>> q, kv = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 5, 2, 8))
      >>> attend(q, kv, kv, window=3).shape
      (2, 5, 4, 8)
    """
    inputs = (q_BSNH, k_BSGH, v_BSGH, segment_ids, window, scale, soft_cap)
    if implementation == "xla":
        return plain.attend_causally(*inputs)
    if implementation == "cudnn":
        return cudnn.attend(*inputs)
    on = default_platform() if platform is None else platform
    return splash.attend(*inputs, interpret=on != "tpu")
