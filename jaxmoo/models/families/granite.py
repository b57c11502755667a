"""Granite 3 (dense)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmoo.models.checks import check_number, refuse
from jaxmoo.models.families.family import Family


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse(config, hidden_act="silu", attention_bias=False)
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier")
    scaling = check_number("logits_scaling", config["logits_scaling"], 0, above=True)
    found = {name: check_number(name, config[name], 0, above=True) for name in names}
    return found | {"logit_scale": 1 / scaling}


GRANITE = Family(
    _read,
    {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
)
