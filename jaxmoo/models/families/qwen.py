"""Qwen2, Qwen2.5 and Qwen3 (dense)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmoo.errors import ConfigError, shown
from jaxmoo.models.checks import check_flag, is_size, refuse
from jaxmoo.models.families.family import Family, LayerKind, by_type, layer_types
from jaxmoo.models.rope import read_rope


def _qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse(config, hidden_act="silu")
    return {"attention_bias": True, "layer_kinds": _kinds(config)}


def _qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse(config, hidden_act="silu", attention_bias=False)
    return {"qk_norm": True, "layer_kinds": _kinds(config)}


def _kinds(config: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    """Layers, of which the first ``max_window_layers`` do without the window."""
    window, rope = config.get("sliding_window", 4096), read_rope(config)
    if not check_flag("use_sliding_window", config.get("use_sliding_window", False)):
        window = None
    first = config.get("max_window_layers", 28)
    if window is not None and first != 0 and not is_size(first):
        raise ConfigError(f"max_window_layers must be a number of layers, got {shown(first)}")

    def default(layers: int) -> list[str]:
        return ["full_attention" if i < first else "sliding_attention" for i in range(layers)]

    far = LayerKind(None, rope)
    if window is None:
        return (far,) * config["num_hidden_layers"]
    return by_type(layer_types(config, default), LayerKind(window, rope), far)


_DEFAULTS = {"num_key_value_heads": 32}

QWEN2 = Family(_qwen2, _DEFAULTS)
QWEN3 = Family(_qwen3, {**_DEFAULTS, "head_dim": 128})
