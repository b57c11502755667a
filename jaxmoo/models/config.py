"""What a decoder looks like: sizes and switches, read from a Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxmoo.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretching of the rotary frequencies beyond the original context.

    Wavelengths longer than ``original / low_freq_factor`` are slowed down by ``factor``, those
    shorter than ``original / high_freq_factor`` are kept, and those between are interpolated.

    Attributes:
      factor: how much the low frequencies are slowed down.
      low_freq_factor: bound of the slowed part, in wavelengths per original context.
      high_freq_factor: bound of the kept part, in wavelengths per original context.
      original_max_position_embeddings: context length before stretching, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder-only transformer of the Llama family.

    Field names are those of Hugging Face's ``config.json``.

    Attributes:
      vocab_size: rows of the embedding (V).
      hidden_size: width of the residual stream (D).
      intermediate_size: width inside the gated MLP (F).
      num_hidden_layers: number of decoder layers.
      num_attention_heads: query heads (N).
      num_key_value_heads: key and value heads (G); N must be a multiple of G.
      head_dim: width of one head (H); need not be hidden_size / num_attention_heads.
      max_position_embeddings: longest sequence, in tokens.
      rope_theta: base of the rotary frequencies.
      rope_scaling: stretching of the rotary frequencies, or None.
      rms_norm_eps: added to the mean square inside every norm.
      tie_word_embeddings: whether the head reuses the embedding.
      attention_bias: whether the q, k and v projections have biases (Qwen2).
      qk_norm: whether each head's queries and keys are RMS-normalised (Qwen3).
      sliding_window: number of tokens that a token attends to, itself included (Mistral); None
        for all before it.

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
    rope_scaling: Llama3Rope | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        optional = () if self.sliding_window is None else ("sliding_window",)
        for name in (*_SIZES, *optional):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"model config: {name} must be a positive integer, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"model config: num_attention_heads ({self.num_attention_heads}) must be a "
                f"multiple of num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model config: head_dim must be even for RoPE, got {self.head_dim}")

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
          jaxmoo.errors.ConfigError: model_type 'lama' is not supported. Did you mean 'llama'? \
Supported: llama, mistral, qwen2, qwen3
        """
        model_type = config.get("model_type")
        read = _ARCHITECTURES.get(str(model_type))
        if read is None:
            raise ConfigError(
                f"model_type {model_type!r} is not supported."
                f"{did_you_mean(str(model_type), _ARCHITECTURES)} "
                f"Supported: {', '.join(sorted(_ARCHITECTURES))}"
            )
        _refuse(config, quantization_config=None, hidden_act="silu", mlp_bias=False)
        fields: dict[str, Any] = {key: config.get(key) for key in _SIZES}
        if fields["num_key_value_heads"] is None:
            fields["num_key_value_heads"] = fields["num_attention_heads"]
        if fields["head_dim"] is None and fields["hidden_size"] and fields["num_attention_heads"]:
            fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
        missing = [key for key, value in fields.items() if value is None]
        if missing:
            raise ConfigError(f"the model's config.json lacks {', '.join(missing)}")
        return cls(
            **fields,
            **_rope(config),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            **read(config),
        )


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


def _refuse(config: Mapping[str, Any], **only: Any) -> None:
    """Raise unless each setting, where present, has the one value that is implemented."""
    for key, supported in only.items():
        found = config.get(key, supported)
        if found != supported:
            raise ConfigError(
                f"{config.get('model_type')} with {key}={found!r} is not supported "
                f"(only {supported!r})"
            )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings from either spelling; the newer one wins where both are present."""
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    if kind not in ("default", "llama3"):
        raise ConfigError(
            f"rope type {kind!r} is not supported.{did_you_mean(kind, ('default', 'llama3'))} "
            "Supported: default, llama3"
        )
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError("partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    names = Llama3Rope.__dataclass_fields__
    missing = [name for name in names if name not in rope]
    if missing:
        raise ConfigError(f"rope type 'llama3' needs {', '.join(missing)} in config.json")
    return {"rope_theta": theta, "rope_scaling": Llama3Rope(**{n: rope[n] for n in names})}


def _llama(config: Mapping[str, Any]) -> dict[str, Any]:
    # Llama's attention_bias also puts a bias on o_proj, which no released model uses.
    _refuse(config, attention_bias=False)
    return {}


def _mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    # 4096 is what transformers takes where an early config does not say.
    return {"sliding_window": config.get("sliding_window", 4096)}


def _qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_bias": True, "sliding_window": _qwen_window(config)}


def _qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    _refuse(config, attention_bias=False)
    return {"qk_norm": True, "sliding_window": _qwen_window(config)}


def _qwen_window(config: Mapping[str, Any]) -> int | None:
    """Qwen's window, which the first ``max_window_layers`` layers do without."""
    window = config.get("sliding_window", 4096)
    if not config.get("use_sliding_window", False) or window is None:
        return None
    kinds = config.get("layer_types")  # transformers 5
    if isinstance(kinds, list) and kinds:
        some, all_ = "sliding_attention" in kinds, set(kinds) == {"sliding_attention"}
    else:
        first = config.get("max_window_layers", 28)
        some, all_ = first < (config.get("num_hidden_layers") or 0), first == 0
    if some and not all_:
        raise ConfigError(
            f"{config.get('model_type')} with a sliding window in some layers only "
            f"(max_window_layers={config.get('max_window_layers')!r}) is not supported (only in "
            "all of them, or in none)"
        )
    return window if some else None


# model_type -> what that architecture adds to (or refuses from) the common fields.
_ARCHITECTURES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
