"""A decoder-only language model with stacked, scanned layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoo.dtypes import at_least_float32
from jaxmoo.engine.block import block, check_remat
from jaxmoo.engine.vocabulary import HeadResiduals, lookup
from jaxmoo.errors import ConfigError
from jaxmoo.kernels.cross_entropy import Logits
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.attention import choose_attention
from jaxmoo.models.experts import Load
from jaxmoo.models.layers import DecoderLayer, Place, make_norm
from jaxmoo.models.loop import over_layers
from jaxmoo.platforms import default_platform

__all__ = ["Decoder"]


class Decoder(nnx.Module):
    """A decoder-only transformer of one of :data:`jaxmoo.models.families.FAMILIES`.

    Parameter paths follow Hugging Face's names with Flax's leaf names (``kernel`` [in, out],
    ``scale``, ``bias``, ``embedding`` [V, D]). Layers are stored in *segments*: runs of
    consecutive layers whose leaves are stacked along a leading axis and scanned over. A segment
    is named by the number of its first layer, so ``segments=(0, 22)`` of a model of 30 layers has
    leaves ``layers.0.*`` of shape [22, ...] and ``layers.22.*`` of shape [8, ...]. Segments do not
    change what is computed; they let a trainer split off the layers it trains, and what lies
    before the first of those costs no backward pass. Layers with one MLP and layers with a mixture
    of experts lie in segments of their own, whichever are asked for.

    Matrix products use JAX's default precision. On devices whose default for float32 is
    lower than float32 (TPU, NVIDIA's TF32), set ``jax_default_matmul_precision`` to "highest" to
    reproduce float32 results.

    Args:
      config: sizes.
      segments: first layer of each segment; increasing, beginning with 0.
      dtype: dtype of the computation; norms, softmax and logits are float32
        even where it is less.
      param_dtype: dtype of the parameters.
      remat: what the backward pass recomputes: "full" keeps only each layer's input (least
        memory), "dots" also the products with parameters, "none" everything (fastest).
      attention: implementation of attention, "xla", "cudnn" or "tpu", or "auto" for the fastest
        that can run; chosen once, here, for `platform`.
      platform: the kind of devices that it will run on, "cpu", "gpu" or "tpu"; see
        :func:`jaxmoo.platforms.platform_of`. By default that of JAX's devices.
      rngs: random initial values; see `abstract` to have none.

    Raises:
      ConfigError: on segments or remat that make no sense, or attention that cannot run here.

    Example:
      >>> config = DecoderConfig(
      ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
      ...     num_attention_heads=4, num_key_value_heads=2, head_dim=8,
      ...     max_position_embeddings=128)
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((3, 5), jnp.int32)).shape
      (3, 5, 64)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        segments: tuple[int, ...] = (0,),
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: str = "full",
        attention: str = "auto",
        platform: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.segments = _check_segments(segments, config)
        self.dtype = jnp.dtype(dtype)
        self.remat = check_remat(remat)
        self.platform = default_platform() if platform is None else platform
        self.attention = choose_attention(
            attention,
            head_dim=config.head_dim,
            dtype=self.dtype,
            platform=self.platform,
            soft_cap=config.attn_logit_softcapping,
        )
        kw: dict[str, Any] = {"dtype": self.dtype, "param_dtype": jnp.dtype(param_dtype)}
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rngs=rngs, **kw)
        self.layers = nnx.Dict(
            {
                str(first): DecoderLayer(
                    config,
                    experts=config.has_experts(first),
                    stack=(end - first,),
                    attention=self.attention,
                    platform=self.platform,
                    rngs=rngs,
                    **kw,
                )
                for first, end in self.spans
            }
        )
        self.norm = make_norm(config, config.hidden_size, **kw)
        if config.tie_word_embeddings:
            self.lm_head = None
        else:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size, rngs=rngs, **kw)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First layer of each segment, and the first behind it."""
        ends = (*self.segments[1:], self.config.num_hidden_layers)
        return list(zip(self.segments, ends, strict=True))

    @property
    def logits_form(self) -> Logits:
        """How products of hidden states and the head's table become logits."""
        return Logits(self.config.logit_scale, self.config.final_logit_softcapping)

    @classmethod
    def abstract(cls, config: DecoderConfig, **kwargs: Any) -> Decoder:
        """Make a Decoder whose parameters are shapes and dtypes only.

        Args:
          config: sizes.
          **kwargs: as for the constructor, without ``rngs``.

        Returns:
          A Decoder with `jax.ShapeDtypeStruct` leaves.
        """
        return nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), **kwargs))

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Compute the hidden states that the head reads.

        Attention is causal, so padding on the right needs no mask.

        Args:
          tokens: int32 [B, S].
          positions: int32 [B, S], for rows in which several texts are packed; 0 ... S - 1 by
            default.
          segment_ids: int32 [B, S]; tokens attend only to tokens with their own number.

        Returns:
          [B, S, D] after the final norm, in the dtype of the computation.

        Raises:
          ConfigError: when S exceeds the model's longest sequence.
        """
        return self.hidden_and_residuals(tokens, positions=positions, segment_ids=segment_ids)[0]

    def hidden_and_residuals(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, HeadResiduals | None]:
        """Compute `hidden`, and what :func:`jaxmoo.engine.vocabulary.nll` needs for a tied head."""
        return self.hidden_and_loads(tokens, positions=positions, segment_ids=segment_ids)[:2]

    def hidden_and_loads(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        counted: jax.Array | None = None,
    ) -> tuple[jax.Array, HeadResiduals | None, list[Load]]:
        """Compute `hidden_and_residuals`, and what is asked of the layers' experts.

        Args:
          tokens: see `hidden`.
          positions: see `hidden`.
          segment_ids: see `hidden`.
          counted: bool [B, S], tokens that count in the loads; None: nothing is told.

        Returns:
          Hidden states, residuals, and for each segment of layers with experts their loads,
          stacked.
        """
        length = tokens.shape[-1]
        if length > self.config.max_position_embeddings:
            raise ConfigError(
                f"sequence of {length} tokens, but the model was made for at most "
                f"{self.config.max_position_embeddings} (max_position_embeddings)"
            )
        if positions is None:
            positions = jnp.arange(length)
        h_BSD, residuals = lookup(
            self.embed_tokens.embedding.get_value(), tokens, self.dtype, self.logits_form
        )

        def body(layer: DecoderLayer, place: Place, h_BSD: jax.Array) -> tuple[jax.Array, Any]:
            if counted is None:
                return layer(h_BSD, place, segment_ids), None
            return layer.with_load(h_BSD, place, segment_ids, counted)

        h_BSD, loads = over_layers(
            self,
            positions,
            body,
            self._scaled(h_BSD),
            segment_ids=segment_ids,
            remat=self.remat,
        )
        h_BSD = block(self.norm, remat=self.remat)(h_BSD)
        return h_BSD, residuals, [load for load in loads if load is not None]

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Look up what the first layer reads, [B, S, D], outside of an engine."""
        return self._scaled(self.embed_tokens.embedding.get_value()[tokens].astype(self.dtype))

    def _scaled(self, h_BSD: jax.Array) -> jax.Array:
        factor = self.config.embedding_multiplier
        return h_BSD if factor == 1 else h_BSD * jnp.asarray(factor, h_BSD.dtype)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Compute logits.

        Args:
          tokens: int32 [B, S].
          positions: see `hidden`.
          segment_ids: see `hidden`.

        Returns:
          float32 [B, S, V]. For losses see `token_nll`, which never holds an array of this size.
        """
        return self.logits(self.hidden(tokens, positions=positions, segment_ids=segment_ids))

    def logits(self, h_BSD: jax.Array) -> jax.Array:
        """Compute logits from what `hidden` returns, float32 [..., V]."""
        table_VD = self.head_table().astype(self.dtype)
        wide = at_least_float32(self.dtype)
        return self.logits_form.of(jnp.matmul(h_BSD, table_VD.T, preferred_element_type=wide))

    def head_table(self) -> jax.Array:
        """Return the head's table [V, D] in the parameters' dtype; tied: the embedding."""
        module = self.embed_tokens if self.lm_head is None else self.lm_head
        return module.embedding.get_value()


class Embedding(nnx.Module):
    """One vector per token, to look up or to score."""

    def __init__(self, num_tokens: int, size: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.dtype = dtype
        init = jax.nn.initializers.normal(0.02)
        self.embedding = nnx.Param(init(rngs.params(), (num_tokens, size), param_dtype))


def _check_segments(segments: tuple[int, ...], config: DecoderConfig) -> tuple[int, ...]:
    """Segments that are asked for, and those that layers of two kinds of MLP make."""
    segments, num_layers = tuple(segments), config.num_hidden_layers
    ends = (*segments[1:], num_layers)
    if segments[:1] != (0,) or any(a >= b for a, b in zip(segments, ends, strict=True)):
        raise ConfigError(
            f"segments must increase from 0 and stay below the {num_layers} layers, got {segments}"
        )
    kinds = [config.has_experts(layer) for layer in range(num_layers)]
    changes = (i for i in range(1, num_layers) if kinds[i] != kinds[i - 1])
    return tuple(sorted({*segments, *changes}))
