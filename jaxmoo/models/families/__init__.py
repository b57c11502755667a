"""Families of models: a file each, and the one place where all of them are entered.

To add one, see *Another family* in the documentation of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from jaxmoo.models.families.apertus import APERTUS
from jaxmoo.models.families.cohere import COHERE, COHERE2
from jaxmoo.models.families.family import Family, LayerKind
from jaxmoo.models.families.gemma import GEMMA2, GEMMA3, GEMMA3_TEXT
from jaxmoo.models.families.granite import GRANITE
from jaxmoo.models.families.llama import LLAMA
from jaxmoo.models.families.mistral import MISTRAL, MIXTRAL
from jaxmoo.models.families.olmo import OLMO2, OLMO3
from jaxmoo.models.families.phi3 import PHI3
from jaxmoo.models.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from jaxmoo.models.families.smollm3 import SMOLLM3

__all__ = ["FAMILIES", "Family", "LayerKind"]

# By the ``model_type`` of their ``config.json``.
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "apertus": APERTUS,
        "cohere": COHERE,
        "cohere2": COHERE2,
        "gemma2": GEMMA2,
        "gemma3": GEMMA3,
        "gemma3_text": GEMMA3_TEXT,
        "granite": GRANITE,
        "llama": LLAMA,
        "mistral": MISTRAL,
        "mixtral": MIXTRAL,
        "olmo2": OLMO2,
        "olmo3": OLMO3,
        "phi3": PHI3,
        "qwen2": QWEN2,
        "qwen3": QWEN3,
        "qwen3_moe": QWEN3_MOE,
        "smollm3": SMOLLM3,
    }
)
