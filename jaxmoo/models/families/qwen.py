"""Qwen2, Qwen2.5 and Qwen3, dense and with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmoo.errors import ConfigError, shown
from jaxmoo.models.checks import check_flag, check_size, is_size, refuse
from jaxmoo.models.families.experts import read_experts
from jaxmoo.models.families.family import Family, LayerKind, by_type, layer_types
from jaxmoo.models.rope import read_rope


def _qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse(config, hidden_act="silu")
    return {"attention_bias": True, "layer_kinds": _kinds(config)}


def _qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse(config, hidden_act="silu", attention_bias=False)
    return {"qk_norm": True, "layer_kinds": _kinds(config)}


def _qwen3_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse(config, hidden_act="silu", attention_bias=False)
    windows = check_flag("use_sliding_window", config.get("use_sliding_window", False))
    return read_experts(config) | {
        "qk_norm": True,
        "sliding_window": config.get("sliding_window", 4096) if windows else None,
        "moe_intermediate_size": config["moe_intermediate_size"],
        "norm_topk_prob": check_flag("norm_topk_prob", config["norm_topk_prob"]),
        "dense_layers": _dense_layers(config),
    }


def _dense_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers that are named, and those between every so many-th."""
    named, step = config.get("mlp_only_layers") or [], config["decoder_sparse_step"]
    layers = range(config["num_hidden_layers"])
    # A number that no layer has is a mistake, but one that transformers takes.
    if not isinstance(named, list) or not all(x == 0 or is_size(x) for x in named):
        raise ConfigError(f"mlp_only_layers must be a list of layers, got {shown(named)}")
    check_size("decoder_sparse_step", step)
    return tuple(i for i in layers if i in named or (i + 1) % step)


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
QWEN3_MOE = Family(
    _qwen3_moe,
    {
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": 0.001,
    },
)
