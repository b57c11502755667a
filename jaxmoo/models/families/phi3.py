"""Phi-3 and Phi-4, whose files hold q, k and v in one matrix, and so the MLP's gate and up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmoo.models.checks import check_number, refuse
from jaxmoo.models.families.family import Family, Names
from jaxmoo.models.rope import Rope, read_rope, rotated_share


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse(config, hidden_act="silu")
    rope, head = _rope(config), config["head_dim"]
    share = check_number("partial_rotary_factor", rotated_share(config), 0, above=True)
    rotated = int(head * share)
    return {
        "sliding_window": config.get("sliding_window"),
        "rotary_dim": None if rotated == head else rotated,
        "rope": rope,
    }


def _rope(config: Mapping[str, Any]) -> Rope:
    """Rotary settings; early configs call longrope by other names."""
    renamed = dict(config)
    for name in ("rope_scaling", "rope_parameters"):
        found = config.get(name)
        if isinstance(found, Mapping):
            kind = found.get("rope_type", found.get("type", "default"))
            renamed[name] = {
                **found,
                "rope_type": "longrope" if kind in ("su", "yarn") else kind,
            }
    return read_rope(renamed, partial=True)


PHI3 = Family(
    _read,
    {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    },
    Names(
        fused={
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        }
    ),
)
