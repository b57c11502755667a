"""The parts of a decoder layer.

A layer's parameters are declared once, with an optional leading axis for a stack of layers; the
computation is written for one layer and takes modules whose leaves have no such axis.

Shape suffixes: B batch, S sequence, D hidden, F MLP width, N query heads, G key/value heads,
H head width.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoo.dtypes import at_least_float32
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.attention import Window, attend, attend_where, size_of
from jaxmoo.models.experts import Experts, Load
from jaxmoo.models.linear import Linear
from jaxmoo.models.rope import Rope, angle_tables, frequencies

__all__ = [
    "MLP",
    "XIELU",
    "Attention",
    "DecoderLayer",
    "LayerNorm",
    "Place",
    "RMSNorm",
    "make_norm",
    "rope_frequencies",
    "rope_tables",
]


class Place(NamedTuple):
    """What a layer is told of the kind it is.

    Attributes:
      cos: of the rotary angles, [S, H / 2] or [B, S, H / 2]; None for no rotary positions.
      sin: as cos.
      window: see :func:`jaxmoo.models.attention.attend`.
    """

    cos: jax.Array | None
    sin: jax.Array | None
    window: Window = None

    def near(self, mask: jax.Array, distance: jax.Array) -> jax.Array:
        """Of what a mask lets tokens attend to, what the window spans, by distance in positions."""
        size = size_of(self.window)
        return mask if size is None else mask & (distance < size)


def rope_tables(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles of a model whose layers are alike, in float32.

    Args:
      config: gives the width, rope_theta and rope_scaling.
      positions: int32 [..., S].

    Returns:
      (cos, sin), each [..., S, H / 2].
    """
    rope = Rope(config.rope_theta, config.rope_scaling)
    return angle_tables(rope, config.rotary_width, positions)


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """Angles by which one position turns each pair, float32 [H / 2].

    Args:
      config: see `rope_tables`.
    """
    return frequencies(Rope(config.rope_theta, config.rope_scaling), config.rotary_width)


def _rotate(x_BSNH: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
    """Rotate each pair, (i, i + H / 2) or (2 i, 2 i + 1), of the entries that are rotated."""
    x = x_BSNH.astype(at_least_float32(x_BSNH.dtype))
    width = 2 * cos.shape[-1]
    x, rest = (x, None) if width == x.shape[-1] else (x[..., :width], x[..., width:])
    cos, sin = cos[..., None, :], sin[..., None, :]
    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        x = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)
    else:
        a, b = jnp.split(x, 2, axis=-1)
        x = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    return (x if rest is None else jnp.concatenate([x, rest], -1)).astype(x_BSNH.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in at least float32."""

    def __init__(
        self,
        size: int,
        epsilon: float,
        *,
        offset: float = 0.0,
        stack: tuple[int, ...] = (),
        dtype: Any,
        param_dtype: Any,
    ):
        self.epsilon = epsilon
        self.offset = offset
        self.dtype = dtype
        self.scale = nnx.Param(jnp.full((*stack, size), 1 - offset, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis; the shape stays."""
        x = x.astype(at_least_float32(x.dtype))
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale[...].astype(x.dtype)
        return (x * (scale + self.offset if self.offset else scale)).astype(self.dtype)


class LayerNorm(RMSNorm):
    """The same of what differs from the mean; without a bias."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis; the shape stays."""
        x = x.astype(at_least_float32(x.dtype))
        return super().__call__(x - x.mean(-1, keepdims=True))


def make_norm(config: DecoderConfig, size: int, **kw: Any) -> RMSNorm:
    """Make the norm that a model has.

    Args:
      config: gives its kind.
      size: width of what it normalises.
      **kw: see `RMSNorm`.
    """
    if config.norm == "layer":
        return LayerNorm(size, config.rms_norm_eps, **kw)
    offset = 1.0 if config.norm == "rms_offset" else 0.0
    return RMSNorm(size, config.rms_norm_eps, offset=offset, **kw)


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
        self.scale = config.attention_multiplier
        self.soft_cap = config.attn_logit_softcapping
        self.rope_interleaved = config.rope_interleaved
        self.qk_norm_whole = config.qk_norm_whole
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        linear = partial(Linear, stack=stack, platform=platform, rngs=rngs, **kw)
        projection = partial(linear, config.hidden_size, bias=config.attention_bias)
        self.q_proj = projection(width)
        self.k_proj = projection(kv_width)
        self.v_proj = projection(kv_width)
        self.o_proj = linear(width, config.hidden_size)
        sizes = (width, kv_width) if config.qk_norm_whole else (config.head_dim,) * 2
        q_norm, k_norm = (make_norm(config, size, stack=stack, **kw) for size in sizes)
        self.q_norm = q_norm if config.qk_norm else None
        self.k_norm = k_norm if config.qk_norm else None

    def __call__(
        self, x_BSD: jax.Array, place: Place, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """What the heads find within each row, ``[B, S, D] -> [B, S, N, H]``; see `attend`."""
        q_BSNH, k_BSGH, v_BSGH = self.project(x_BSD, place)
        return attend(
            q_BSNH,
            k_BSGH,
            v_BSGH,
            segment_ids=segment_ids,
            window=place.window,
            implementation=self.attention,
            platform=self.platform,
            scale=self.scale,
            soft_cap=self.soft_cap,
        )

    def attend_where(
        self, q_BSNH: jax.Array, k_BTGH: jax.Array, v_BTGH: jax.Array, mask_BST: jax.Array
    ) -> jax.Array:
        """The same where a mask says which token attends to which."""
        return attend_where(
            q_BSNH, k_BTGH, v_BTGH, mask_BST, scale=self.scale, soft_cap=self.soft_cap
        )

    def combine(self, out_BSNH: jax.Array) -> jax.Array:
        """Project what the heads found back to the residual stream, [B, S, D]."""
        return self.o_proj(out_BSNH.reshape(*out_BSNH.shape[:2], -1))

    def project(self, x_BSD: jax.Array, place: Place) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Compute rotated queries [B, S, N, H] and keys, and values, [B, S, G, H]."""
        heads = (*x_BSD.shape[:2], -1, self.head_dim)
        q, k = self.q_proj(x_BSD), self.k_proj(x_BSD)
        if self.qk_norm_whole:
            q, k = self._normalise(q, k)
        q_BSNH, k_BSGH = q.reshape(heads), k.reshape(heads)
        v_BSGH = self.v_proj(x_BSD).reshape(heads)
        if not self.qk_norm_whole:
            q_BSNH, k_BSGH = self._normalise(q_BSNH, k_BSGH)
        if place.cos is None or place.sin is None:
            return q_BSNH, k_BSGH, v_BSGH
        rotate = partial(_rotate, cos=place.cos, sin=place.sin, interleaved=self.rope_interleaved)
        return rotate(q_BSNH), rotate(k_BSGH), v_BSGH

    def _normalise(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q), self.k_norm(k)


class XIELU(nnx.Module):
    """xIELU: a parabola above 0, an exponential less a line below, both with a learnt weight.

    Huang et al., *Deriving activation functions using integration*,
    `arXiv:2411.13010 <https://arxiv.org/abs/2411.13010>`_.
    """

    beta = 0.5  # the slope at 0
    epsilon = -1e-6  # from where the exponential is taken

    def __init__(self, *, stack: tuple[int, ...] = (), dtype: Any, param_dtype: Any):
        self.dtype = dtype

        def start(weight: float) -> nnx.Param:
            return nnx.Param(jnp.full((*stack, 1), math.log(math.expm1(weight)), param_dtype))

        self.alpha_p, self.alpha_n = start(0.8), start(0.8 - self.beta)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply it to every element."""
        x = x.astype(at_least_float32(x.dtype))
        above = jax.nn.softplus(self.alpha_p[...].astype(x.dtype))
        below = self.beta + jax.nn.softplus(self.alpha_n[...].astype(x.dtype))
        bent = (jnp.expm1(jnp.minimum(x, self.epsilon)) - x) * below
        return (jnp.where(x > 0, above * x * x, bent) + self.beta * x).astype(self.dtype)


_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True)}


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate."""

    def __init__(self, config: DecoderConfig, *, platform: str, rngs: nnx.Rngs, **kw: Any):
        linear = partial(Linear, platform=platform, rngs=rngs, **kw)
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(*sizes) if config.gated_mlp else None
        self.up_proj = linear(*sizes)
        self.down_proj = linear(*sizes[::-1])
        learnt = config.hidden_act == "xielu"
        self.act_fn = XIELU(**kw) if learnt else _ACTIVATIONS[config.hidden_act]

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        """Map every position by itself, ``[B, S, D] -> [B, S, D]``."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x_BSD)))
        return self.down_proj(self.act_fn(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))

    def count_active(self, x_BSD: jax.Array, counted_BS: jax.Array) -> jax.Array:
        """In how many counted tokens each neuron's activation is above 0, int32 [B, F]."""
        gate = self.up_proj if self.gate_proj is None else self.gate_proj
        before = gate(x_BSD)
        # The others have the sign of what they are given.
        active = (self.act_fn(before) if isinstance(self.act_fn, XIELU) else before) > 0
        return (active & counted_BS[..., None]).sum(1, dtype=jnp.int32)


# Where a layer has norms, by their names: before and after attention, before and after the MLP.
_NORMS: dict[str, tuple[str | None, ...]] = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "parallel": ("input_layernorm", None, None, None),
}


class DecoderLayer(nnx.Module):
    """Attention and MLP, normalised and added to the residual stream.

    Args:
      config: sizes.
      experts: whether its MLP is a mixture of experts.
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
        experts: bool = False,
        stack: tuple[int, ...] = (),
        attention: str = "xla",
        platform: str,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = {"stack": stack, "dtype": dtype, "param_dtype": param_dtype}
        self.norms = _NORMS[config.norm_places]
        self.parallel = config.norm_places == "parallel"
        self.residual_multiplier = config.residual_multiplier
        for name in self.norms:
            if name is not None:
                setattr(self, name, make_norm(config, config.hidden_size, **kw))
        self.self_attn = Attention(config, attention=attention, platform=platform, rngs=rngs, **kw)
        mlp = Experts if experts else MLP
        self.mlp = mlp(config, platform=platform, rngs=rngs, **kw)

    def __call__(
        self, h_BSD: jax.Array, place: Place, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Apply one layer.

        Args:
          h_BSD: residual stream.
          place: its window and rotary positions.
          segment_ids: int32 [B, S]; tokens attend only within their own segment.

        Returns:
          The residual stream after the layer, [B, S, D].
        """
        return self.finish(h_BSD, self.attend(h_BSD, place, segment_ids))

    def with_load(
        self,
        h_BSD: jax.Array,
        place: Place,
        segment_ids: jax.Array | None,
        counted_BS: jax.Array,
    ) -> tuple[jax.Array, Load | None]:
        """Apply one layer, and tell what is asked of its experts; None where it has none.

        Args:
          h_BSD: residual stream.
          place: see a call.
          segment_ids: see a call.
          counted_BS: see :meth:`jaxmoo.models.experts.Experts.with_load`.
        """
        out_BSNH = self.attend(h_BSD, place, segment_ids)
        if not isinstance(self.mlp, Experts):
            return self.finish(h_BSD, out_BSNH), None
        h_BSD, x_BSD = self.before_mlp(h_BSD, out_BSNH)
        found_BSD, load = self.mlp.with_load(x_BSD, counted_BS)
        return self.after_mlp(h_BSD, found_BSD), load

    def attend(
        self, h_BSD: jax.Array, place: Place, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """What the layer's heads find, [B, S, N, H]; arguments are those of a call."""
        return self.self_attn(self._norm(0, h_BSD), place, segment_ids)

    def project(self, h_BSD: jax.Array, place: Place) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the layer attends with, for attention of another kind; see `Attention.project`."""
        return self.self_attn.project(self._norm(0, h_BSD), place)

    def finish(self, h_BSD: jax.Array, out_BSNH: jax.Array) -> jax.Array:
        """The rest of the layer, given what its heads found."""
        h_BSD, x_BSD = self.before_mlp(h_BSD, out_BSNH)
        return self.after_mlp(h_BSD, self.mlp(x_BSD))

    def before_mlp(self, h_BSD: jax.Array, out_BSNH: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The residual stream after attention, and what the MLP reads."""
        found = self._norm(1, self.self_attn.combine(out_BSNH))
        if self.parallel:
            return self._add(h_BSD, found), self._norm(0, h_BSD)
        h_BSD = self._add(h_BSD, found)
        return h_BSD, self._norm(2, h_BSD)

    def after_mlp(self, h_BSD: jax.Array, found_BSD: jax.Array) -> jax.Array:
        """The residual stream after the layer, given what the MLP found."""
        return self._add(h_BSD, self._norm(3, found_BSD))

    def _norm(self, number: int, x_BSD: jax.Array) -> jax.Array:
        name = self.norms[number]
        return x_BSD if name is None else getattr(self, name)(x_BSD)

    def _add(self, h_BSD: jax.Array, found_BSD: jax.Array) -> jax.Array:
        if self.residual_multiplier != 1:
            wide = found_BSD.astype(at_least_float32(found_BSD.dtype))
            found_BSD = (wide * self.residual_multiplier).astype(found_BSD.dtype)
        return h_BSD + found_BSD
