"""SmolLM3, some of whose layers have no rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmoo.errors import ConfigError, shown
from jaxmoo.models.checks import check_flag, check_size, refuse
from jaxmoo.models.families.family import Family, LayerKind, layer_types
from jaxmoo.models.rope import read_rope


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse(config, hidden_act="silu", attention_bias=False)
    rope, turned = read_rope(config, theta=2e6), _rotated(config)
    window = config.get("sliding_window")
    if not check_flag("use_sliding_window", config.get("use_sliding_window", False)):
        window = None

    def default(layers: int) -> list[str]:
        near = window is not None
        return [
            "sliding_attention" if near and not turned[i] else "full_attention"
            for i in range(layers)
        ]

    kinds = tuple(
        LayerKind(window if kind == "sliding_attention" else None, rope if turn else None)
        for kind, turn in zip(layer_types(config, default), turned, strict=True)
    )
    return {"layer_kinds": kinds}


def _rotated(config: Mapping[str, Any]) -> list[int]:
    """Which layers have rotary positions: 1, or 0 for none; the name says the opposite."""
    layers = check_size("num_hidden_layers", config["num_hidden_layers"])
    found = config.get("no_rope_layers")
    if found is None:
        every = check_size("no_rope_layer_interval", config.get("no_rope_layer_interval", 4))
        return [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(found, list) or len(found) != layers or any(x not in (0, 1) for x in found):
        raise ConfigError(
            f"no_rope_layers must be a list of 0 or 1, one for each of the {layers} layers, got "
            f"{shown(found)}"
        )
    return found


SMOLLM3 = Family(
    _read,
    {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
    },
)
