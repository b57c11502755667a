"""Stretched rotary frequencies in GGUF files: fields, and tensors of factors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmoo.errors import CheckpointError, shown
from jaxmoo.hf.gguf_architectures import Architecture
from jaxmoo.hf.gguf_fields import Fields
from jaxmoo.models.rope import (
    LinearRope,
    Llama3Rope,
    LongRope,
    Rope,
    YarnRope,
    attention_factor,
    frequencies,
)

__all__ = ["FACTORS", "plain_yarn", "read_scaling", "scaling_fields", "shortest"]

_FREQUENCIES = "rope_freqs.weight"  # Llama 3's; what each frequency is divided by
_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"
FACTORS = (_FREQUENCIES, _SHORT, _LONG)

_TYPE, _FACTOR = "rope.scaling.type", "rope.scaling.factor"
_ORIGINAL = "rope.scaling.original_context_length"
_ATTENTION = "rope.scaling.attn_factor"


def read_scaling(
    header: Fields, factors: Mapping[str, np.ndarray], theta: float, width: int
) -> dict[str, Any] | None:
    """Return the stretching that a file says, as ``rope_scaling`` of a ``config.json``.

    Args:
      header: the architecture's fields.
      factors: tensors of the names in `FACTORS`, float32 [width / 2].
      theta: base of the frequencies.
      width: entries of a head that are rotated.

    Raises:
      CheckpointError: it is none that is known.
    """
    header.require({"rope.scale_linear": 1.0})
    kind = header.text(_TYPE, "none")
    if kind in ("linear", "yarn") and not factors:
        scaling: dict[str, Any] = {"rope_type": kind, "factor": shortest(header.number(_FACTOR))}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = header.size(_ORIGINAL)
            _check_yarn(header, scaling["factor"])
        return scaling
    long = bool(factors.keys() & {_SHORT, _LONG})
    # Older files have its factors without saying its name.
    named = "longrope" if long and kind == "longrope" else "none"
    header.require({_FACTOR: 1.0, _TYPE: named})
    if long:
        return _long(header, factors)
    return _llama3(factors[_FREQUENCIES], theta, width) if factors else None


def _check_yarn(header: Fields, factor: float) -> None:
    """Raise unless a file has the usual bounds and attention, the only ones that llama.cpp has."""
    own = {"ext_factor": 1.0, "log_multiplier": 0.0, "beta_fast": 32.0, "beta_slow": 1.0}
    header.require({_ATTENTION: 1.0, **{f"rope.scaling.yarn_{k}": v for k, v in own.items()}})
    name, usual = "rope.scaling.yarn_attn_factor", _yarn_attention(factor)
    if not math.isclose(header.number(name, usual), usual, rel_tol=1e-5):
        header.require({name: usual})


def _yarn_attention(factor: float) -> float:
    return attention_factor(YarnRope(factor, 1))


def _long(header: Fields, factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    missing = {_SHORT, _LONG} - factors.keys()
    if missing:
        raise CheckpointError(f"the tensor {missing.pop()!r} is missing")
    return {
        "rope_type": "longrope",
        "short_factor": [shortest(x) for x in factors[_SHORT].ravel()],
        "long_factor": [shortest(x) for x in factors[_LONG].ravel()],
        "original_max_position_embeddings": header.size(_ORIGINAL),
        "attention_factor": shortest(header.number(_ATTENTION, 1.0)),
    }


def _llama3(factors: np.ndarray, theta: float, width: int) -> dict[str, Any]:
    if not factors.size or factors.shape != (width // 2,):
        raise CheckpointError(
            f"{_FREQUENCIES} has the shape {list(factors.shape)}, expected {[width // 2]}"
        )
    # Of the four numbers of Llama 3's rule all its models share three.
    scaling = {
        "factor": shortest(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rope = Rope(theta, Llama3Rope(**scaling))
    if not np.allclose(factors, _divisors(rope, width), rtol=1e-3):
        raise CheckpointError(
            f"{_FREQUENCIES} does not hold Llama 3's factors; other stretched rotary frequencies "
            "cannot be converted"
        )
    return {"rope_type": "llama3", **scaling}


def _divisors(rope: Rope, width: int) -> np.ndarray:
    """What a stretching divides each frequency by."""
    plain = frequencies(dataclasses.replace(rope, scaling=None), width)
    return (plain / frequencies(rope, width)).astype(np.float32)


def scaling_fields(
    rope: Rope, width: int, architecture: Architecture
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the architecture's fields, and the tensors, that say a stretching.

    Args:
      rope: of layers without a window.
      width: entries of a head that are rotated.
      architecture: of the file.

    Returns:
      Values of fields, and tensors, float32 [width / 2], by name.

    Raises:
      CheckpointError: llama.cpp does not read such a stretching in this architecture.
    """
    scaling = rope.scaling
    if scaling is None:
        return {}, {}
    if isinstance(scaling, Llama3Rope) and architecture.name == "llama":
        return {}, {_FREQUENCIES: _divisors(rope, width)}
    if isinstance(scaling, LongRope) and architecture.name == "phi3":
        factors = {_SHORT: scaling.short_factor, _LONG: scaling.long_factor}
        fields = {
            _ORIGINAL: scaling.original_max_position_embeddings,
            _ATTENTION: float(scaling.attention_factor),
        }
        return fields, {name: np.asarray(x, np.float32) for name, x in factors.items()}
    if isinstance(scaling, LinearRope):
        return {_TYPE: "linear", _FACTOR: float(scaling.factor)}, {}
    if isinstance(scaling, YarnRope):
        original = scaling.original_max_position_embeddings
        return {_TYPE: "yarn", _FACTOR: float(scaling.factor), _ORIGINAL: original}, {}
    raise CheckpointError(
        f"GGUF files of the {architecture.name} architecture cannot hold stretched rotary "
        f"frequencies ({shown(scaling)})"
    )


def plain_yarn(scaling: Any) -> Any:
    """The same stretching, in which nothing is said that is the rule; anything else as it is."""
    if not isinstance(scaling, YarnRope):
        return scaling
    usual = math.isclose(attention_factor(scaling), _yarn_attention(scaling.factor), rel_tol=1e-6)
    return dataclasses.replace(
        scaling,
        attention_factor=None if usual else attention_factor(scaling),
        mscale=None,
        mscale_all_dim=None,
        beta_fast=scaling.beta_fast or 32.0,
        beta_slow=scaling.beta_slow or 1.0,
    )


def shortest(value: float) -> float:
    """Undo the widening of a float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))
