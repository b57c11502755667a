"""Gemma 2, and the text models of Gemma 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmoo.models.checks import check_number, check_size, refuse
from jaxmoo.models.families.family import Family, LayerKind, Names, by_type, pattern
from jaxmoo.models.rope import Rope, read_rope

_NO_MORE = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "use_bidirectional_attention": False,
}


def _both(config: Mapping[str, Any]) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common."""
    scalar = check_number("query_pre_attn_scalar", config["query_pre_attn_scalar"], 0, above=True)
    return {
        "norm": "rms_offset",
        "norm_places": "both",
        "hidden_act": "gelu_pytorch_tanh",
        "attention_multiplier": scalar**-0.5,
        "embedding_multiplier": check_size("hidden_size", config["hidden_size"]) ** 0.5,
        "final_logit_softcapping": config["final_logit_softcapping"],
    }


def _kinds(config: Mapping[str, Any], period: Any, local: Rope, far: Rope) -> Any:
    near = LayerKind(config["sliding_window"], local)
    return by_type(pattern(config, period), near, LayerKind(None, far))


def _gemma2(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse(config, **_NO_MORE)
    rope = read_rope(config)
    return {
        **_both(config),
        "attn_logit_softcapping": config["attn_logit_softcapping"],
        "layer_kinds": _kinds(config, 2, rope, rope),
    }


def _gemma3(config: Mapping[str, Any]) -> dict[str, Any]:
    # transformers does not use attn_logit_softcapping here.
    refuse(config, **_NO_MORE, attn_logit_softcapping=None)
    far = read_rope(config, "full_attention", theta=1e6)
    # Older configs stretch the frequencies of layers without a window only.
    older = {key: value for key, value in config.items() if key != "rope_scaling"}
    older["rope_theta"] = config.get("rope_local_base_freq", 1e4)
    local = read_rope(older, "sliding_attention")
    period = config.get("sliding_window_pattern", 6)
    return {**_both(config), "qk_norm": True, "layer_kinds": _kinds(config, period, local, far)}


_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_DEFAULTS_3 = {
    **_DEFAULTS,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": None,
}

GEMMA2 = Family(
    _gemma2,
    {
        **_DEFAULTS,
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
)
GEMMA3_TEXT = Family(_gemma3, _DEFAULTS_3)
# A model of texts and images, of which the text model is read.
GEMMA3 = Family(
    _gemma3,
    _DEFAULTS_3,
    Names(
        prefix="language_model.model.",
        head="language_model.lm_head",
        others={"vision_tower.": "vision tower", "multi_modal_projector.": "vision tower"},
    ),
    part="text_config",
)
