"""The parts of a decoder layer.

A layer's parameters are declared once, with an optional leading axis for a stack of layers; the
computation is written for one layer and takes modules whose leaves have no such axis.

Shape suffixes: B batch, S sequence, D hidden, F MLP width, N query heads, G key/value heads,
H head width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoo.dtypes import at_least_float32
from jaxmoo.kernels.product import product
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.attention import attend

__all__ = [
    "MLP",
    "Attention",
    "DecoderLayer",
    "Linear",
    "RMSNorm",
    "rope_frequencies",
    "rope_tables",
]

_normal = jax.nn.initializers.normal(0.02)


def rope_tables(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles, in float32.

    Args:
      config: gives head_dim, rope_theta and rope_scaling.
      positions: int32 [..., S].

    Returns:
      (cos, sin), each [..., S, H / 2].
    """
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(rope_frequencies(config))
    return jnp.cos(angles), jnp.sin(angles)


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """Angles by which one position turns each pair, float32 [H / 2].

    Args:
      config: see `rope_tables`.
    """
    # Constants of the program. In float32 throughout, as the reference implementation has them:
    # a last-bit difference here is multiplied by the position.
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / np.power(np.float32(config.rope_theta), exponents)
    if config.rope_scaling is not None:
        s = config.rope_scaling
        turns = s.original_max_position_embeddings * frequencies / np.float32(2 * np.pi)
        keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        keep = np.clip(keep, 0, 1).astype(np.float32)
        frequencies = (1 - keep) * frequencies / np.float32(s.factor) + keep * frequencies
    return frequencies.astype(np.float32)


def _rotate(x_BSNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate each pair (i, i + H / 2), the layout of Hugging Face's weights."""
    a, b = jnp.split(x_BSNH.astype(at_least_float32(x_BSNH.dtype)), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BSNH.dtype)


class Linear(nnx.Module):
    """x @ kernel (+ bias), computed in ``dtype``."""

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
        self.kernel = nnx.Param(_normal(rngs.params(), (*stack, size_in, size_out), param_dtype))
        self.bias = nnx.Param(jnp.zeros((*stack, size_out), param_dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map the last axis: ``[..., in] -> [..., out]``."""
        y = product(x, self.kernel[...].astype(self.dtype), self.platform)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in at least float32."""

    def __init__(
        self,
        size: int,
        epsilon: float,
        *,
        stack: tuple[int, ...] = (),
        dtype: Any,
        param_dtype: Any,
    ):
        self.epsilon = epsilon
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((*stack, size), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis; the shape stays."""
        x = x.astype(at_least_float32(x.dtype))
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * self.scale[...].astype(x.dtype)).astype(self.dtype)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        stack: tuple[int, ...] = (),
        attention: str = "xla",
        platform: str,
        rngs: nnx.Rngs,
        **kw: Any,
    ):
        self.platform = platform
        self.head_dim = config.head_dim
        self.attention = attention
        self.window = config.sliding_window
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        linear = partial(Linear, stack=stack, platform=platform, rngs=rngs, **kw)
        projection = partial(linear, config.hidden_size, bias=config.attention_bias)
        self.q_proj = projection(width)
        self.k_proj = projection(kv_width)
        self.v_proj = projection(kv_width)
        self.o_proj = linear(width, config.hidden_size)
        norm = partial(RMSNorm, config.head_dim, config.rms_norm_eps, stack=stack, **kw)
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None

    def __call__(
        self,
        x_BSD: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Attend within each row, ``[B, S, D] -> [B, S, D]``; see `attend`."""
        q_BSNH, k_BSGH, v_BSGH = self.project(x_BSD, cos, sin)
        out_BSNH = attend(
            q_BSNH,
            k_BSGH,
            v_BSGH,
            segment_ids=segment_ids,
            window=self.window,
            implementation=self.attention,
            platform=self.platform,
        )
        return self.combine(out_BSNH)

    def combine(self, out_BSNH: jax.Array) -> jax.Array:
        """Project what the heads found back to the residual stream, [B, S, D]."""
        return self.o_proj(out_BSNH.reshape(*out_BSNH.shape[:2], -1))

    def project(
        self, x_BSD: jax.Array, cos: jax.Array, sin: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Compute rotated queries [B, S, N, H] and keys, and values, [B, S, G, H]."""
        heads = (*x_BSD.shape[:2], -1, self.head_dim)
        q_BSNH = self.q_proj(x_BSD).reshape(heads)
        k_BSGH = self.k_proj(x_BSD).reshape(heads)
        v_BSGH = self.v_proj(x_BSD).reshape(heads)
        if self.q_norm is not None and self.k_norm is not None:
            q_BSNH, k_BSGH = self.q_norm(q_BSNH), self.k_norm(k_BSGH)
        return _rotate(q_BSNH, cos, sin), _rotate(k_BSGH, cos, sin), v_BSGH


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, **kw: Any):
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, **kw)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, **kw)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, **kw)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        """Map every position by itself, ``[B, S, D] -> [B, S, D]``."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))


class DecoderLayer(nnx.Module):
    """Attention and MLP, each on a normalised input and added to the residual stream.

    Args:
      config: sizes.
      stack: leading axis of every parameter: ``(n,)`` declares n layers at once, ``()`` one.
        A stack is storage; only a module without the axis can be called.
      attention: one of :data:`jaxmoo.models.attention.IMPLEMENTATIONS`.
      platform: see :class:`~jaxmoo.models.Decoder`.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
      rngs: source of random initial values.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        stack: tuple[int, ...] = (),
        attention: str = "xla",
        platform: str,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = {"stack": stack, "dtype": dtype, "param_dtype": param_dtype}
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **kw)
        self.self_attn = Attention(config, attention=attention, platform=platform, rngs=rngs, **kw)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **kw)
        self.mlp = MLP(config, platform=platform, rngs=rngs, **kw)

    def __call__(
        self,
        h_BSD: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Apply one layer.

        Args:
          h_BSD: residual stream.
          cos: from `rope_tables`, [S, H / 2] or [B, S, H / 2].
          sin: as cos.
          segment_ids: int32 [B, S]; tokens attend only within their own segment.

        Returns:
          The residual stream after the layer, [B, S, D].
        """
        return self.transform(self.attend(h_BSD, cos, sin, segment_ids))

    def project(
        self, h_BSD: jax.Array, cos: jax.Array, sin: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the layer attends with, for attention of another kind; see `Attention.project`."""
        return self.self_attn.project(self.input_layernorm(h_BSD), cos, sin)

    def finish(self, h_BSD: jax.Array, out_BSNH: jax.Array) -> jax.Array:
        """The rest of the layer, given what its heads found."""
        return self.transform(h_BSD + self.self_attn.combine(out_BSNH))

    def transform(self, h_BSD: jax.Array) -> jax.Array:
        """Apply the MLP half of the layer."""
        return h_BSD + self.mlp(self.post_attention_layernorm(h_BSD))

    def attend(
        self,
        h_BSD: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Apply the attention half of the layer; arguments and result are those of a call."""
        return h_BSD + self.self_attn(self.input_layernorm(h_BSD), cos, sin, segment_ids)
