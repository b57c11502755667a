"""Cohere's Command R and Aya Expanse, and Command R7B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmoo.models.checks import check_size, refuse
from jaxmoo.models.families.family import Family, LayerKind, by_type, pattern
from jaxmoo.models.rope import read_rope

_DEFAULTS = {"tie_word_embeddings": True, "layer_norm_eps": 1e-5, "logit_scale": 0.0625}


def _cohere(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse(
        config,
        hidden_act="silu",
        attention_bias=False,
        use_qk_norm=False,  # Command R+
    )
    return {
        "norm": "layer",
        "norm_places": "parallel",
        "rms_norm_eps": config["layer_norm_eps"],
        "rope_interleaved": True,
        "logit_scale": config["logit_scale"],
        "rope": read_rope(config, theta=5e5),
    }


def _cohere2(config: Mapping[str, Any]) -> dict[str, Any]:
    window = check_size("sliding_window", config["sliding_window"])
    near = LayerKind(window, read_rope(config))
    far = LayerKind(None, None)
    types = pattern(config, config.get("sliding_window_pattern", 4))
    common = _cohere(config)
    del common["rope"]
    return {**common, "layer_kinds": by_type(types, near, far)}


COHERE = Family(_cohere, _DEFAULTS)
COHERE2 = Family(_cohere2, {**_DEFAULTS, "sliding_window": 4096})
