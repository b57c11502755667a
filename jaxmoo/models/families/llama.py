"""Llama 3 and what has its architecture: SmolLM2, EuroLLM, Salamandra."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmoo.models.checks import refuse
from jaxmoo.models.families.family import Family


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    # Llama's attention_bias also puts a bias on o_proj, which no released model uses.
    refuse(config, hidden_act="silu", attention_bias=False)
    return {}


LLAMA = Family(_read)
