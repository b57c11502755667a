"""Mistral and Mixtral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmoo.models.checks import refuse
from jaxmoo.models.families.experts import read_experts
from jaxmoo.models.families.family import Family, Names
from jaxmoo.models.rope import read_rope


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse(config, hidden_act="silu")
    # 4096 is what transformers takes where an early config does not say.
    return {"sliding_window": config.get("sliding_window", 4096)}


def _mixtral(config: Mapping[str, Any]) -> dict[str, Any]:
    # Noise on what the router reads, in training only.
    refuse(config, hidden_act="silu", router_jitter_noise=0.0)
    return read_experts(config) | {
        "moe_intermediate_size": config["intermediate_size"],
        "sliding_window": config.get("sliding_window"),
        "rope": read_rope(config, theta=1e6),
    }


MISTRAL = Family(_read, {"num_key_value_heads": 8})
MIXTRAL = Family(
    _mixtral,
    {
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    Names(
        {
            "mlp.gate": "block_sparse_moe.gate",
            "mlp.experts.{e}.gate_proj": "block_sparse_moe.experts.{e}.w1",
            "mlp.experts.{e}.down_proj": "block_sparse_moe.experts.{e}.w2",
            "mlp.experts.{e}.up_proj": "block_sparse_moe.experts.{e}.w3",
        }
    ),
)
