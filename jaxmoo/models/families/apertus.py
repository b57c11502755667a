"""Apertus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmoo.models.checks import refuse
from jaxmoo.models.families.family import Family, Names
from jaxmoo.models.rope import read_rope

_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 12e6,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse(config, hidden_act="xielu", attention_bias=False)
    stretched = any(config.get(name) for name in ("rope_scaling", "rope_parameters"))
    rope = read_rope(config if stretched else {**config, "rope_parameters": _ROPE}, theta=12e6)
    return {"hidden_act": "xielu", "gated_mlp": False, "qk_norm": True, "rope": rope}


APERTUS = Family(
    _read,
    {"hidden_act": "xielu", "rms_norm_eps": 1e-5},
    Names(
        modules={
            "input_layernorm": "attention_layernorm",
            "post_attention_layernorm": "feedforward_layernorm",
        },
        # The bounds of its activation, which transformers keeps with the weights.
        constants={"mlp.act_fn.beta": 0.5, "mlp.act_fn.eps": -1e-6},
    ),
)
