"""Rotary positions: how fast each pair of a head's entries turns, and tables of their angles.

Frequencies are constants of the program. They are formed in float32 throughout, as the reference
implementation has them: a last-bit difference is multiplied by the position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoo.errors import ConfigError, did_you_mean, shown
from jaxmoo.models.checks import check_flag, check_number, check_size

__all__ = [
    "LinearRope",
    "Llama3Rope",
    "LongRope",
    "Rope",
    "YarnRope",
    "angle_tables",
    "attention_factor",
    "frequencies",
    "read_rope",
    "rotated_share",
]


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
        check_number("factor", self.factor, 1)
        check_number("low_freq_factor", self.low_freq_factor, 0, above=True)
        check_number("high_freq_factor", self.high_freq_factor, self.low_freq_factor, above=True)
        check_size("original_max_position_embeddings", self.original_max_position_embeddings)


@dataclass(frozen=True)
class LinearRope:
    """All frequencies slowed down alike (Chen et al., arXiv:2306.15595).

    Attributes:
      factor: by how much; at least 1.

    Raises:
      ConfigError: a value is of another type or out of range.
    """

    factor: float

    def __post_init__(self) -> None:
        check_number("factor", self.factor, 1)


@dataclass(frozen=True)
class YarnRope:
    """YaRN: low frequencies slowed down, high ones kept (Peng et al., arXiv:2309.00071).

    Attributes:
      factor: how much the low frequencies are slowed down; at least 1.
      original_max_position_embeddings: context length before stretching, in tokens.
      attention_factor: by which cosines and sines are multiplied; None: what `factor` and the two
        below give.
      beta_fast: turns within the original context from which a frequency is kept.
      beta_slow: turns up to which it is slowed down by the whole factor.
      mscale: weight of the factor's logarithm in the attention factor, with the next.
      mscale_all_dim: the same in its denominator.
      truncate: whether the bounds of the part between are rounded to whole entries.

    Raises:
      ConfigError: a value is of another type or out of range.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float | None = 32.0
    beta_slow: float | None = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        check_number("factor", self.factor, 1)
        check_size("original_max_position_embeddings", self.original_max_position_embeddings)
        for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0)
        check_flag("truncate", self.truncate)


@dataclass(frozen=True)
class LongRope:
    """LongRoPE: every frequency has a factor of its own (Ding et al., arXiv:2402.13753).

    Which list is used is decided for each text by its last position, padding included; in rows of
    several texts there is none.

    Attributes:
      short_factor: what frequencies are divided by, within the original context; one per pair.
      long_factor: the same beyond it.
      original_max_position_embeddings: context length before stretching, in tokens.
      attention_factor: by which cosines and sines are multiplied.

    Raises:
      ConfigError: a value is of another type or out of range.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float

    def __post_init__(self) -> None:
        for name in ("short_factor", "long_factor"):
            found = getattr(self, name)
            if not isinstance(found, tuple) or not found:
                raise ConfigError(f"model config: {name} must be numbers, got {shown(found)}")
            for one in found:
                check_number(f"an entry of {name}", one, 0, above=True)
        check_size("original_max_position_embeddings", self.original_max_position_embeddings)
        check_number("attention_factor", self.attention_factor, 0)


RopeScaling = Llama3Rope | LinearRope | YarnRope | LongRope


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a layer.

    Attributes:
      theta: base of the frequencies; at least 1.
      scaling: their stretching, or None.
    """

    theta: float = 10000.0
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        check_number("rope_theta", self.theta, 1)

    def check_width(self, width: int) -> None:
        """Raise ConfigError unless heads can be turned of which so many entries are rotated."""
        if not isinstance(self.scaling, LongRope):
            return
        for found in (self.scaling.short_factor, self.scaling.long_factor):
            if len(found) != width // 2:
                raise ConfigError(
                    f"model config: longrope's factors must be one for each of the {width // 2} "
                    f"pairs of a head, got {len(found)}"
                )


_DATACLASSES = {"llama3": Llama3Rope, "linear": LinearRope, "yarn": YarnRope, "longrope": LongRope}
# Up to the longest sequence of a model, which none exceeds here, `dynamic` changes nothing.
_KINDS = ("default", "dynamic", *_DATACLASSES)


def read_rope(
    config: Mapping[str, Any],
    layer_type: str | None = None,
    *,
    theta: Any = 1e4,
    partial: bool = False,
) -> Rope:
    """Read the rotary settings of a ``config.json``, in either spelling; the newer one wins.

    Args:
      config: the parsed JSON object.
      layer_type: of which layers, where ``rope_parameters`` has those of each type by its name.
      theta: base of the frequencies where the config has none.
      partial: whether the caller reads `rotated_share`; else only whole heads are rotated.

    Raises:
      ConfigError: on an unknown type of stretching, or values that are missing or out of range.
    """
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        found = config.get(name)
        if isinstance(found, Mapping) and layer_type is not None and layer_type in found:
            found = found[layer_type]
        elif found and layer_type is not None and name == "rope_parameters":
            raise ConfigError(
                f"rope_parameters must have those of {layer_type}, got {shown(found)}"
            )
        if found is not None and not isinstance(found, Mapping):
            raise ConfigError(f"{name} must be an object or null, got {shown(found)}")
        rope |= found or {}
    theta = check_number("rope_theta", rope.get("rope_theta", config.get("rope_theta", theta)), 1)
    if not partial and rope.get("partial_rotary_factor", rotated_share(config)) != 1.0:
        raise ConfigError("partial_rotary_factor other than 1 is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _KINDS:
        raise ConfigError(
            f"rope type {shown(kind)} is not supported."
            f"{did_you_mean(shown(kind), _KINDS)} "
            f"Supported: {', '.join(_KINDS)}"
        )
    if kind in ("default", "dynamic"):
        return Rope(theta)
    if kind == "longrope":
        return Rope(theta, _long(config, rope))
    made = _DATACLASSES[kind]
    outside = config.get("original_max_position_embeddings")
    if outside is not None and layer_type is None:  # which transformers prefers
        rope["original_max_position_embeddings"] = outside
    missing = [f.name for f in fields(made) if f.default is MISSING and f.name not in rope]
    if missing:
        raise ConfigError(f"rope type {kind!r} needs {', '.join(missing)} in config.json")
    return Rope(theta, made(**{f.name: rope[f.name] for f in fields(made) if f.name in rope}))


def rotated_share(config: Mapping[str, Any]) -> Any:
    """Which share of a head's entries is rotated, as a ``config.json`` says it."""
    for name in ("rope_parameters", "rope_scaling"):
        found = config.get(name)
        if isinstance(found, Mapping) and "partial_rotary_factor" in found:
            return found["partial_rotary_factor"]
    share = config.get("partial_rotary_factor")
    return 1.0 if share is None else share


def _long(config: Mapping[str, Any], rope: Mapping[str, Any]) -> LongRope:
    longest = config.get("max_position_embeddings")
    original = config.get(
        "original_max_position_embeddings", rope.get("original_max_position_embeddings", longest)
    )
    missing = [name for name in ("short_factor", "long_factor") if rope.get(name) is None]
    if missing:
        raise ConfigError(f"rope type 'longrope' needs {', '.join(missing)} in config.json")
    factor = rope.get("factor")
    if factor is None:
        factor = check_size("max_position_embeddings", longest) / check_size(
            "original_max_position_embeddings", original
        )
    check_number("factor", factor, 0, above=True)
    attention = rope.get("attention_factor")
    if attention is None:
        attention = 1.0
        if factor > 1:
            attention = math.sqrt(1 + math.log(factor) / math.log(max(original, 2)))
    short, long = (
        tuple(x) if isinstance(x := rope[name], list) else x
        for name in ("short_factor", "long_factor")
    )
    return LongRope(short, long, original, attention)


def frequencies(rope: Rope, width: int) -> np.ndarray:
    """Angles by which one position turns each pair, float32 [width / 2].

    Of `LongRope`, those within the original context.

    Args:
      rope: which.
      width: entries of a head that are rotated.
    """
    scaling = rope.scaling
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    wavelengths = np.power(np.float32(rope.theta), exponents)  # over 2 pi
    plain = np.float32(1) / wavelengths
    if isinstance(scaling, Llama3Rope):
        turns = scaling.original_max_position_embeddings * plain / np.float32(2 * np.pi)
        keep = (turns - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        keep = np.clip(keep, 0, 1).astype(np.float32)
        plain = (1 - keep) * plain / np.float32(scaling.factor) + keep * plain
    elif isinstance(scaling, LinearRope):
        plain = plain / np.float32(scaling.factor)
    elif isinstance(scaling, YarnRope):
        slowed = np.float32(1) / (np.float32(scaling.factor) * wavelengths)
        keep = np.float32(1) - _yarn_ramp(rope.theta, scaling, width)
        plain = slowed * (1 - keep) + plain * keep
    elif isinstance(scaling, LongRope):
        plain = _divided(scaling.short_factor, wavelengths)
    return plain.astype(np.float32)


def _divided(factors: tuple[float, ...], wavelengths: np.ndarray) -> np.ndarray:
    return np.float32(1) / (np.asarray(factors, np.float32) * wavelengths)


def _yarn_ramp(theta: float, scaling: YarnRope, width: int) -> np.ndarray:
    """0 for pairs whose frequency is kept, 1 for those slowed down; float32 [width / 2]."""

    def pair(turns: float) -> float:  # that makes so many turns within the original context
        context = scaling.original_max_position_embeddings
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast or 32), pair(scaling.beta_slow or 1)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high = high if high != low else high + 0.001
    ramp = (np.arange(width // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return np.clip(ramp, 0, 1).astype(np.float32)


def attention_factor(scaling: RopeScaling | None) -> float:
    """By how much cosines and sines are multiplied."""
    if isinstance(scaling, LongRope):
        return scaling.attention_factor
    if not isinstance(scaling, YarnRope):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1.0)


def angle_tables(
    rope: Rope, width: int, positions: jax.Array, segment_ids: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles, in float32.

    Args:
      rope: which.
      width: entries of a head that are rotated.
      positions: int32 [..., S].
      segment_ids: int32 [..., S], of rows in which several texts are packed, one behind the other.

    Returns:
      (cos, sin), each [..., S, width / 2].
    """
    speeds = jnp.asarray(frequencies(rope, width))
    scaling = rope.scaling
    if isinstance(scaling, LongRope):
        exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        slow = _divided(scaling.long_factor, np.power(np.float32(rope.theta), exponents))
        last = _last_position(positions, segment_ids)
        long = last >= scaling.original_max_position_embeddings
        speeds = jnp.where(long[..., None], slow, speeds)
    angles = jnp.asarray(positions[..., None], jnp.float32) * speeds
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    factor = attention_factor(scaling)
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def _last_position(positions: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """The last position of the text that each token is of, [..., S], or of each row, [..., 1]."""
    if segment_ids is None:
        return jnp.max(positions, -1, keepdims=True)
    slots = jnp.arange(segment_ids.shape[-1])
    changes = segment_ids[..., 1:] != segment_ids[..., :-1]
    last = jnp.pad(changes, [(0, 0)] * (changes.ndim - 1) + [(0, 1)], constant_values=True)
    end = jax.lax.cummin(jnp.where(last, slots, slots[-1]), segment_ids.ndim - 1, reverse=True)
    return jnp.take_along_axis(positions, end, -1)
