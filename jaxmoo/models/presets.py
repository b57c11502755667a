"""Shapes of published models, to plan a run without downloading anything."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxmoo.errors import ConfigError, did_you_mean
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.rope import Llama3Rope

__all__ = ["PRESETS", "preset"]


def preset(name: str) -> DecoderConfig:
    """Return the shape of a published model.

    Args:
      name: its name on the Hugging Face hub, with or without the owner and what is put behind the
        size (``-Instruct``); upper or lower case.

    Raises:
      ConfigError: it is not among :data:`PRESETS`.

    Example:
      >>> preset("Qwen/Qwen3-8B").num_hidden_layers
      36
      >>> preset("qwen3-9b")
      Traceback (most recent call last):
      ...
      jaxmoo.errors.ConfigError: there is no preset 'qwen3-9b'. Did you mean 'Qwen3-8B'? There are \
Apertus-8B, Aya-Expanse-8B, EuroLLM-1.7B, EuroLLM-9B, Gemma-3-4B, Llama-3.1-8B, Llama-3.2-1B, \
Llama-3.2-3B, Meta-Llama-3-8B, Mixtral-8x7B, Qwen3-0.6B, Qwen3-1.7B, Qwen3-30B-A3B, Qwen3-4B, \
Qwen3-8B, Salamandra-2B, Salamandra-7B, SmolLM2-135M
    """
    wanted = name.rpartition("/")[2].lower()
    for known, config in PRESETS.items():
        if f"{wanted}-".startswith(f"{known.lower()}-"):
            return config
    raise ConfigError(
        f"there is no preset {name!r}.{did_you_mean(name, PRESETS)} There are {', '.join(PRESETS)}"
    )


def _llama_3(**changes: Any) -> DecoderConfig:
    return DecoderConfig(
        **{
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 8192,
            "rope_theta": 5e5,
            "rms_norm_eps": 1e-5,
            **changes,
        }
    )


def _llama_3_2(hidden: int, layers: int, heads: int, head_dim: int) -> DecoderConfig:
    return _llama_3(
        hidden_size=hidden,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_scaling=Llama3Rope(32.0, 1.0, 4.0, 8192),
        tie_word_embeddings=True,
    )


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        qk_norm=True,
        family="qwen3",
    )


def _european(
    vocabulary: int, context: int, hidden: int, intermediate: int, layers: int, kv_heads: int = 8
) -> DecoderConfig:
    """EuroLLM and Salamandra."""
    return DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=kv_heads,
        head_dim=128,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
    )


PRESETS: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        "Apertus-8B": DecoderConfig.from_hf(
            {
                "model_type": "apertus",
                "vocab_size": 131072,
                "hidden_size": 4096,
                "intermediate_size": 21504,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "max_position_embeddings": 65536,
            }
        ),
        "Aya-Expanse-8B": DecoderConfig.from_hf(
            {
                "model_type": "cohere",
                "vocab_size": 256000,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "max_position_embeddings": 8192,
                "rope_theta": 1e4,
                "logit_scale": 0.125,
            }
        ),
        "EuroLLM-1.7B": _european(128000, 4096, 2048, 5632, 24),
        "EuroLLM-9B": _european(128000, 4096, 4096, 12288, 42),
        "Gemma-3-4B": DecoderConfig.from_hf(
            {
                "model_type": "gemma3_text",
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "sliding_window": 1024,
            }
        ),
        "Llama-3.1-8B": _llama_3(
            max_position_embeddings=131072, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192)
        ),
        "Llama-3.2-1B": _llama_3_2(2048, 16, 32, 64),
        "Llama-3.2-3B": _llama_3_2(3072, 28, 24, 128),
        "Meta-Llama-3-8B": _llama_3(),
        "Mixtral-8x7B": DecoderConfig.from_hf(
            {
                "model_type": "mixtral",
                "vocab_size": 32000,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "max_position_embeddings": 32768,
            }
        ),
        "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
        "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
        "Qwen3-30B-A3B": DecoderConfig.from_hf(
            {
                "model_type": "qwen3_moe",
                "vocab_size": 151936,
                "hidden_size": 2048,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "max_position_embeddings": 40960,
                "rope_theta": 1e6,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "norm_topk_prob": True,
            }
        ),
        "Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
        "Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
        "Salamandra-2B": _european(256000, 8192, 2048, 5440, 24, kv_heads=16),
        "Salamandra-7B": _european(256000, 8192, 4096, 11008, 32),
        "SmolLM2-135M": DecoderConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            max_position_embeddings=8192,
            rope_theta=1e5,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        ),
    }
)
