"""Small random checkpoints made by transformers, the oracle of the model and conversion tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmoo.models import logical_paths, named_leaves
from jaxmoo.models.families import FAMILIES
from jaxmoo.models.paths import stacked_axes

if TYPE_CHECKING:  # seconds of importing, which only those pay for who make a model
    import torch

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
NEAR_NEAR_FAR = ["sliding_attention", "sliding_attention", "full_attention"]
# Every architecture and switch that is read from a config.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_tied": {"tie_word_embeddings": True},
    "llama_one_head_per_group": {"num_key_value_heads": 6, "head_dim": 8},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE},
    "mistral": {"sliding_window": 16},
    "mixtral": {"sliding_window": 16, "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3_window": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    "qwen2_windows": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
        "use_sliding_window": True,
        "sliding_window": 7,
    },
    "gemma3_text": {
        "sliding_window": 7,
        "layer_types": NEAR_NEAR_FAR,
        "query_pre_attn_scalar": 13,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gemma2": {
        "sliding_window": 7,
        "query_pre_attn_scalar": 13,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "olmo2": {},
    "olmo3": {
        "sliding_window": 7,
        "layer_types": NEAR_NEAR_FAR,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 5e5,
                "factor": 4.0,
                "original_max_position_embeddings": 24,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        },
    },
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "apertus": {},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"sliding_window": 7, "layer_types": NEAR_NEAR_FAR},
    "phi3": {
        "head_dim": 8,
        "original_max_position_embeddings": 8,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2],
            "long_factor": [1.0, 2.0, 5.0],
        },
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 4.0,
    },
}


def make(variant: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A randomly initialised transformers model; norms and biases are random too."""
    import torch
    import transformers

    model_type = variant if variant in FAMILIES else variant.split("_")[0]
    model_type = model_type.replace("llama3", "llama")
    settings = {**SIZES, **VARIANTS[variant], **overrides}
    config = transformers.AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                # Gemma's scales are stored less 1.
                one = 0 if model_type.startswith("gemma") else 1
                parameter.copy_(one + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.15 * torch.randn_like(parameter))
    return model.eval()


def save(variant: str, path: Path, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    """Make a model, save it as a Hugging Face directory in float32 or another type, return it."""
    model = make(variant, **kwargs).to(dtype)
    model.save_pretrained(path)
    return model


def in_files(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensors of a transformers model as it writes them: of experts, one by one."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors) if "experts" in str(list(tensors)) else tensors


def tokens_and_mask(
    vocab_size: int, shape: tuple[int, ...], *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and a random loss mask."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, shape).astype(np.int32)
    return tokens, rng.random(shape) < 0.4


def by_logical_path(state: Any, *, leading: int = 0) -> dict[str, np.ndarray]:
    """Arrays of a state by logical path; each has so many axes before those of the parameter."""
    arrays = {}
    for path, leaf in named_leaves(state):
        value, shape = np.asarray(leaf), leaf.shape[leading:]
        names, axes = logical_paths(path, shape), stacked_axes(path)
        value = value.reshape(*leaf.shape[:leading], len(names), *shape[axes:])
        arrays |= {name: value.take(i, leading) for i, name in enumerate(names)}
    return arrays
