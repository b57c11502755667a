"""What a decoder looks like: sizes and switches, read from a Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxmoo.errors import ConfigError, did_you_mean, shown
from jaxmoo.models.checks import check_flag, check_number, check_size, is_size, refuse
from jaxmoo.models.families import FAMILIES, LayerKind
from jaxmoo.models.rope import Rope, RopeScaling, read_rope

__all__ = ["DecoderConfig"]

_LARGEST_HEAD = 2**16  # its rotary frequencies are written into the program
_MOST_LAYERS = 10_000  # each of them has parameters by name
_MOST_PARAMETERS = 2**50  # more than any machine holds


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder-only transformer.

    Field names are those of Hugging Face's ``config.json``, where it has them.

    Attributes:
      vocab_size: rows of the embedding (V).
      hidden_size: width of the residual stream (D).
      intermediate_size: width inside the MLP (F).
      num_hidden_layers: number of decoder layers.
      num_attention_heads: query heads (N).
      num_key_value_heads: key and value heads (G); N must be a multiple of G.
      head_dim: width of one head (H); need not be hidden_size / num_attention_heads.
      max_position_embeddings: longest sequence, in tokens.
      rope_theta: base of the rotary frequencies; at least 1.
      rope_scaling: stretching of the rotary frequencies, or None.
      rms_norm_eps: added to the mean square (or variance) inside every norm; at least 0.
      tie_word_embeddings: whether the head reuses the embedding.
      attention_bias: whether the q, k and v projections have biases (Qwen2).
      qk_norm: whether queries and keys are normalised: every head by itself (Qwen3).
      sliding_window: number of tokens that a token attends to, itself included (Mistral); None
        for all before it.
      family: by whose names parameters are known in files; a key of
        :data:`jaxmoo.models.families.FAMILIES`.
      layer_kinds: window and rotary positions of each layer, where layers differ (Gemma); they
        replace ``sliding_window``, ``rope_theta`` and ``rope_scaling``. Empty where they do not.
      rotary_dim: entries of a head that are rotated, the first; None for all (Phi-3).
      rope_interleaved: whether neighbouring entries are a pair, rather than those half a head
        apart (Cohere).
      qk_norm_whole: whether `qk_norm` normalises the heads of a token together (OLMo 2).
      norm: "rms"; "rms_offset", whose scales are stored less 1 (Gemma); or "layer", which
        subtracts the mean first (Cohere).
      norm_places: where a layer has norms: "before" attention and MLP; "after" them (OLMo 2);
        "both" (Gemma 2); or "parallel", one before the two, which then read the same (Cohere).
      hidden_act: the MLP's activation: "silu", "gelu_pytorch_tanh" or "xielu".
      gated_mlp: whether the activation is multiplied by a second projection (not in Apertus).
      attention_multiplier: what scores of attention are multiplied by; None: 1 / sqrt(H).
      attn_logit_softcapping: c: scores of attention become c tanh(score / c) (Gemma 2); or None.
      embedding_multiplier: what looked-up vectors are multiplied by; rounded to the dtype of the
        computation.
      residual_multiplier: what attention and MLP give is multiplied by (Granite).
      logit_scale: what logits are multiplied by (Cohere).
      final_logit_softcapping: c: logits then become c tanh(logit / c) (Gemma 2); or None.
      num_experts: experts in a layer (E), of which a token reads some; 0: layers have one MLP.
      num_experts_per_tok: how many of them; at most E.
      moe_intermediate_size: width inside an expert.
      norm_topk_prob: whether the weights of a token's experts are made to add up to 1.
      dense_layers: numbers of the layers that have one MLP in a model with experts, ascending.
      router_aux_loss_coef: what the router's loss is multiplied by in training, where a run does
        not say; see :func:`jaxmoo.models.router_loss`.

    Raises:
      ConfigError: a value is of another type or out of range, or sizes do not go together.

    Example:
      >>> config = DecoderConfig(
      ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
      ...     num_attention_heads=4, num_key_value_heads=2, head_dim=8,
      ...     max_position_embeddings=128)
      >>> config.rope_theta
      10000.0
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    family: str = "llama"
    layer_kinds: tuple[LayerKind, ...] = ()
    rotary_dim: int | None = None
    rope_interleaved: bool = False
    qk_norm_whole: bool = False
    norm: str = "rms"
    norm_places: str = "before"
    hidden_act: str = "silu"
    gated_mlp: bool = True
    attention_multiplier: float | None = None
    attn_logit_softcapping: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_scale: float = 1.0
    final_logit_softcapping: float | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        optional = () if self.sliding_window is None else ("sliding_window",)
        for name in (*_SIZES, *optional):
            check_size(name, getattr(self, name))
        check_number("rope_theta", self.rope_theta, 1)
        check_number("rms_norm_eps", self.rms_norm_eps, 0)
        for name in _FLAGS:
            check_flag(name, getattr(self, name))
        for name in _ABOVE_0:
            if getattr(self, name) is not None or name not in _OR_NONE:
                check_number(name, getattr(self, name), 0, above=True)
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"model config: {name} must be one of {', '.join(known)}, got "
                    f"{shown(getattr(self, name))}"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"model config: num_attention_heads ({self.num_attention_heads}) must be a "
                f"multiple of num_key_value_heads ({self.num_key_value_heads})"
            )
        check_size("num_hidden_layers", self.num_hidden_layers, _MOST_LAYERS)
        check_size("head_dim", self.head_dim, _LARGEST_HEAD)
        if self.head_dim % 2:
            raise ConfigError(f"model config: head_dim must be even for RoPE, got {self.head_dim}")
        rotary = self.rotary_width
        if not is_size(rotary) or rotary > self.head_dim or rotary % 2:
            raise ConfigError(
                f"model config: the rotated part of a head must be an even number of its "
                f"{self.head_dim} entries, got {shown(rotary)}"
            )
        if self.layer_kinds and len(self.layer_kinds) != self.num_hidden_layers:
            raise ConfigError(
                f"model config: there are {len(self.layer_kinds)} layer_kinds for "
                f"{self.num_hidden_layers} layers"
            )
        for kind in dict.fromkeys(self.kinds):
            if kind.rope is not None:
                kind.rope.check_width(rotary)
        if self.num_experts != 0:
            self._check_experts()
        heads = 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        widths = self.intermediate_size, self.num_experts * self.moe_intermediate_size
        layer = self.hidden_size * (heads + (2 + self.gated_mlp) * max(widths))
        parameters = self.num_hidden_layers * layer + self.vocab_size * self.hidden_size
        if parameters > _MOST_PARAMETERS:
            raise ConfigError(
                f"model config: its sizes make {parameters:.1e} parameters, which no machine holds"
            )

    def _check_experts(self) -> None:
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            check_size(name, getattr(self, name))
        check_number("router_aux_loss_coef", self.router_aux_loss_coef, 0)
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"model config: num_experts_per_tok ({self.num_experts_per_tok}) must be at most "
                f"num_experts ({self.num_experts})"
            )
        if not self.gated_mlp:
            raise ConfigError("model config: experts without a gate (gated_mlp) are not supported")
        layers = range(self.num_hidden_layers)
        if any(layer not in layers for layer in self.dense_layers):
            raise ConfigError(
                f"model config: dense_layers must be numbers of the {len(layers)} layers, got "
                f"{shown(self.dense_layers)}"
            )

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def rotary_width(self) -> int:
        """Entries of a head that are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Window and rotary positions of every layer."""
        alike = LayerKind(self.sliding_window, Rope(self.rope_theta, self.rope_scaling))
        return self.layer_kinds or (alike,) * self.num_hidden_layers

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read the contents of a Hugging Face ``config.json``.

        Both spellings of the rotary settings are understood: ``rope_theta`` with
        ``rope_scaling`` (transformers 4) and ``rope_parameters`` (transformers 5).

        Args:
          config: the parsed JSON object.

        Returns:
          The equivalent DecoderConfig.

        Raises:
          ConfigError: when the architecture, or a feature the config switches on, is not
            supported, or when a size is missing. Nothing is ignored silently that would
            change the model's output.

        Example:
          >>> DecoderConfig.from_hf({"model_type": "lama"})
          Traceback (most recent call last):
          ...
          jaxmoo.errors.ConfigError: model_type 'lama' is not supported. Did you ...
        """
        model_type = config.get("model_type")
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None:
            raise ConfigError(
                f"model_type {shown(model_type)} is not supported."
                f"{did_you_mean(shown(model_type), FAMILIES)} "
                f"Supported: {', '.join(sorted(FAMILIES))}"
            )
        refuse(config, quantization_config=None)
        if family.part is not None:
            config = _part(config, family.part)
        config = {**family.defaults, **config}
        refuse(config, mlp_bias=False)
        fields: dict[str, Any] = {key: config.get(key) for key in _SIZES}
        if fields["num_key_value_heads"] is None:
            fields["num_key_value_heads"] = fields["num_attention_heads"]
        missing = [key for key in _SIZES if fields[key] is None and key != "head_dim"]
        if missing:
            raise ConfigError(f"the model's config.json lacks {', '.join(missing)}")
        check_size("num_hidden_layers", fields["num_hidden_layers"], _MOST_LAYERS)
        if fields["head_dim"] is None:
            for key in ("hidden_size", "num_attention_heads"):
                check_size(key, fields[key])
            fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
        fields |= {
            "family": model_type,
            "rms_norm_eps": check_number("rms_norm_eps", config.get("rms_norm_eps", 1e-6), 0),
            "tie_word_embeddings": config.get("tie_word_embeddings", False),
            **family.read(config | {"head_dim": fields["head_dim"]}),
        }
        kinds = fields.get("layer_kinds")
        if not kinds:
            rope = fields.pop("rope", None) or read_rope(config)
        elif len(set(kinds)) > 1 or kinds[0].rope is None:
            return cls(**fields)
        else:
            del fields["layer_kinds"]
            fields["sliding_window"], rope = kinds[0].window, kinds[0].rope
        return cls(**fields, rope_theta=rope.theta, rope_scaling=rope.scaling)


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The description of the text model within that of a model of texts and images."""
    found = config.get(name)
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"{config.get('model_type')} needs {name}, the text model's own description, got "
            f"{shown(found)}"
        )
    refuse(found, quantization_config=None)
    # transformers goes by what the whole says of the head.
    tied = config.get("tie_word_embeddings")
    return found if tied is None else {**found, "tie_word_embeddings": tied}


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_FLAGS = (
    "tie_word_embeddings",
    "attention_bias",
    "qk_norm",
    "rope_interleaved",
    "qk_norm_whole",
    "gated_mlp",
    "norm_topk_prob",
)
_ABOVE_0 = (
    "attention_multiplier",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "residual_multiplier",
    "logit_scale",
    "final_logit_softcapping",
)
_OR_NONE = ("attention_multiplier", "attn_logit_softcapping", "final_logit_softcapping")
_CHOICES = {
    "norm": ("rms", "rms_offset", "layer"),
    "norm_places": ("before", "after", "both", "parallel"),
    "hidden_act": ("silu", "gelu_pytorch_tanh", "xielu"),
    "family": tuple(FAMILIES),
}
