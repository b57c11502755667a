"""Mistral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmoo.models.checks import refuse
from jaxmoo.models.families.family import Family


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse(config, hidden_act="silu")
    # 4096 is what transformers takes where an early config does not say.
    return {"sliding_window": config.get("sliding_window", 4096)}


MISTRAL = Family(_read, {"num_key_value_heads": 8})
