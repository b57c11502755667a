"""What a decoder looks like: sizes and switches, read from a Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmoo.errors import ConfigError, did_you_mean, shown

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_LARGEST = 2**31 - 1  # rows and positions are numbered in 32 bits
_LARGEST_HEAD = 2**16  # its rotary frequencies are written into the program
_MOST_LAYERS = 10_000  # each of them has parameters by name
_MOST_PARAMETERS = 2**50  # more than any machine holds


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretching of the rotary frequencies beyond the original context.

    Wavelengths longer than ``original / low_freq_factor`` are slowed down by ``factor``, those
    shorter than ``original / high_freq_factor`` are kept, and those between are interpolated.

    Attributes:
      factor: how much the low frequencies are slowed down; at least 1.
      low_freq_factor: bound of the slowed part, in wavelengths per original context; above 0.
      high_freq_factor: bound of the kept part, likewise; above the other bound.
      original_max_position_embeddings: context length before stretching, in tokens.

    Raises:
      ConfigError: a value is of another type or out of range.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _check_number("factor", self.factor, 1)
        _check_number("low_freq_factor", self.low_freq_factor, 0, above=True)
        _check_number("high_freq_factor", self.high_freq_factor, self.low_freq_factor, above=True)
        _check_size("original_max_position_embeddings", self.original_max_position_embeddings)


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
      rope_theta: base of the rotary frequencies; at least 1.
      rope_scaling: stretching of the rotary frequencies, or None.
      rms_norm_eps: added to the mean square inside every norm; at least 0.
      tie_word_embeddings: whether the head reuses the embedding.
      attention_bias: whether the q, k and v projections have biases (Qwen2).
      qk_norm: whether each head's queries and keys are RMS-normalised (Qwen3).
      sliding_window: number of tokens that a token attends to, itself included (Mistral); None
        for all before it.

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
    rope_scaling: Llama3Rope | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        optional = () if self.sliding_window is None else ("sliding_window",)
        for name in (*_SIZES, *optional):
            _check_size(name, getattr(self, name))
        _check_number("rope_theta", self.rope_theta, 1)
        _check_number("rms_norm_eps", self.rms_norm_eps, 0)
        for name in ("tie_word_embeddings", "attention_bias", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"model config: {name} must be true or false, got {shown(getattr(self, name))}"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"model config: num_attention_heads ({self.num_attention_heads}) must be a "
                f"multiple of num_key_value_heads ({self.num_key_value_heads})"
            )
        _check_size("num_hidden_layers", self.num_hidden_layers, _MOST_LAYERS)
        _check_size("head_dim", self.head_dim, _LARGEST_HEAD)
        if self.head_dim % 2:
            raise ConfigError(f"model config: head_dim must be even for RoPE, got {self.head_dim}")
        heads = 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        layer = self.hidden_size * (heads + 3 * self.intermediate_size)
        parameters = self.num_hidden_layers * layer + self.vocab_size * self.hidden_size
        if parameters > _MOST_PARAMETERS:
            raise ConfigError(
                f"model config: its sizes make {parameters:.1e} parameters, which no machine holds"
            )

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
        read = _ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
        if read is None:
            raise ConfigError(
                f"model_type {shown(model_type)} is not supported."
                f"{did_you_mean(shown(model_type), _ARCHITECTURES)} "
                f"Supported: {', '.join(sorted(_ARCHITECTURES))}"
            )
        _refuse(config, quantization_config=None, hidden_act="silu", mlp_bias=False)
        fields: dict[str, Any] = {key: config.get(key) for key in _SIZES}
        if fields["num_key_value_heads"] is None:
            fields["num_key_value_heads"] = fields["num_attention_heads"]
        missing = [key for key in _SIZES if fields[key] is None and key != "head_dim"]
        if missing:
            raise ConfigError(f"the model's config.json lacks {', '.join(missing)}")
        if fields["head_dim"] is None:
            for key in ("hidden_size", "num_attention_heads"):
                _check_size(key, fields[key])
            fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
        return cls(
            **fields,
            **_rope(config),
            rms_norm_eps=_check_number("rms_norm_eps", config.get("rms_norm_eps", 1e-6), 0),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
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


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_size(name: str, value: Any, most: int = _LARGEST) -> None:
    if not _is_size(value):
        raise ConfigError(f"model config: {name} must be a positive integer, got {shown(value)}")
    if value > most:
        raise ConfigError(f"model config: {name} must be at most {most}, got {shown(value)}")


def _check_number(name: str, value: Any, least: float, *, above: bool = False) -> float:
    """Return a value, unless it is no number from ``least``, or above it, to float32's largest."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not least <= value <= _FLOAT32_MAX
        or (above and value == least)
    ):
        raise ConfigError(
            f"model config: {name} must be a finite number {'above' if above else 'of at least'} "
            f"{least:g}, got {shown(value)}"
        )
    return float(value)


def _refuse(config: Mapping[str, Any], **only: Any) -> None:
    """Raise unless each setting, where present, has the one value that is implemented."""
    for key, supported in only.items():
        found = config.get(key, supported)
        if found != supported:
            raise ConfigError(
                f"{config.get('model_type')} with {key}={shown(found)} is not supported "
                f"(only {supported!r})"
            )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings from either spelling; the newer one wins where both are present."""
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        found = config.get(name)
        if found is not None and not isinstance(found, Mapping):
            raise ConfigError(f"{name} must be an object or null, got {shown(found)}")
        rope |= found or {}
    theta = _check_number("rope_theta", rope.get("rope_theta", config.get("rope_theta", 1e4)), 1)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ConfigError(
            f"rope type {shown(kind)} is not supported."
            f"{did_you_mean(shown(kind), ('default', 'llama3'))} "
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
    window, used = config.get("sliding_window", 4096), config.get("use_sliding_window", False)
    if not isinstance(used, bool):
        raise ConfigError(f"use_sliding_window must be true or false, got {shown(used)}")
    if not used or window is None:
        return None
    layers = config.get("num_hidden_layers")
    kinds = config.get("layer_types")  # transformers 5
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if (
            not isinstance(kinds, list)
            or len(kinds) != layers
            or any(k not in known for k in kinds)
        ):
            raise ConfigError(
                f"layer_types must be a list of {' or '.join(known)}, one for each of the "
                f"{shown(layers)} layers, got {shown(kinds)}"
            )
        some, all_ = "sliding_attention" in kinds, "full_attention" not in kinds
    else:
        first = config.get("max_window_layers", 28)
        if first != 0 and not _is_size(first):
            raise ConfigError(f"max_window_layers must be a number of layers, got {shown(first)}")
        some, all_ = layers is None or not _is_size(layers) or first < layers, first == 0
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
