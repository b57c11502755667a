"""OLMo 2 and OLMo 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmoo.models.checks import refuse
from jaxmoo.models.families.family import Family, LayerKind, by_type, pattern
from jaxmoo.models.rope import read_rope

_DEFAULTS = {"rms_norm_eps": 1e-5}


def _olmo2(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse(config, hidden_act="silu", attention_bias=False)
    return {"norm_places": "after", "qk_norm": True, "qk_norm_whole": True}


def _olmo3(config: Mapping[str, Any]) -> dict[str, Any]:
    far = read_rope(config, "full_attention", theta=5e5)
    # Older configs stretch the frequencies of layers without a window only.
    older = {key: value for key, value in config.items() if key != "rope_scaling"}
    near = LayerKind(config["sliding_window"], read_rope(older, "sliding_attention", theta=5e5))
    kinds = by_type(pattern(config, 4), near, LayerKind(None, far))
    return {**_olmo2(config), "layer_kinds": kinds}


OLMO2 = Family(_olmo2, _DEFAULTS)
OLMO3 = Family(_olmo3, {**_DEFAULTS, "sliding_window": 4096})
