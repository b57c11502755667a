"""What llama.cpp's architectures are called, and which settings their GGUF files have: one table.

Names of tensors come from the ``gguf`` package. What an architecture takes for granted, so that no
field says it, is in the functions of :attr:`Architecture.implied`. Source: llama.cpp's
``conversion/`` and ``src/models/``, https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from jaxmoo.hf.names import templates
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.rope import Rope

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "longest_text",
    "main_rope",
    "of_family",
    "relaid",
    "settings",
]

_Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """How GGUF files say what a model of a family is.

    Attributes:
      name: GGUF's name of the architecture.
      family: of the model, its ``model_type``.
      transformers: class of the model there.
      sign: the field that files of this family have, and those of another family of the same
        architecture do not, or have as 0.
      sizes: names in ``config.json`` of whole numbers beside those that all have, and their fields.
      numbers: the same of other numbers.
      defaults: values of these that a file may leave out, by name in ``config.json``.
      epsilon: name in ``config.json`` and field of what is added inside norms.
      implied: what no field says, of a config with all that fields say.
      interleaved: whether the two halves of every query and key head are interleaved.
      offset: whether the scales of norms are stored as they are used, and not less 1.
      square: whether heads must be as wide together as the model.
      tied: whether the head must be the embedding; None: it may.
      partial: whether a part of each head may be rotated.
      period: of which layers the last has no window and the others do; 0: none has.
      apart: whether rotary frequencies are stretched only in layers without a window.
    """

    name: str
    family: str
    transformers: str
    sign: str | None = None
    sizes: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    defaults: _Settings = field(default_factory=dict)
    epsilon: tuple[str, str] = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
    implied: Callable[[_Settings], _Settings] = lambda _: {}
    interleaved: bool = False
    offset: bool = False
    square: bool = False
    tied: bool | None = None
    partial: bool = False
    period: int = 0
    apart: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """Fields of `sizes` and `numbers`."""
        return (*self.sizes.values(), *self.numbers.values())

    @functools.cached_property
    def tensors(self) -> Mapping[str, str]:
        """Hugging Face's names of tensors by GGUF's, with ``{i}`` and ``{e}`` for numbers.

        The experts of a layer are one tensor in GGUF files, so ``{e}`` is in Hugging Face's names
        alone.
        """
        kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == self.name)
        names = get_tensor_name_map(kind, 1)
        found = {}
        for name in templates(self.family):
            module, _, leaf = name.rpartition(".")
            part = names.get_name(module.replace("{i}", "0").replace(".{e}", ""))
            if part is not None:
                found[re.sub(r"^blk\.0\.", "blk.{i}.", f"{part}.{leaf}")] = name
        return MappingProxyType(found)


_WINDOW = {"sliding_window": "attention.sliding_window"}
_LOGIT_SCALE = {"logit_scale": "logit_scale"}


def _gemma(largest: int) -> Callable[[_Settings], _Settings]:
    """Scores are divided by the root of a head's width, but in the largest model, by its layers."""

    def implied(config: _Settings) -> _Settings:
        width = config["head_dim"]
        if config["num_hidden_layers"] == largest:
            width = config["hidden_size"] // config["num_attention_heads"]
        act = "gelu_pytorch_tanh"
        return {"query_pre_attn_scalar": width, "hidden_act": act, "hidden_activation": act}

    return implied


_GEMMA2 = Architecture(
    "gemma2",
    "gemma2",
    "Gemma2ForCausalLM",
    sizes=_WINDOW,
    numbers={
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    defaults={
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    implied=_gemma(46),
    offset=True,
    tied=True,
    period=2,
)
_GEMMA3 = Architecture(
    "gemma3",
    "gemma3_text",
    "Gemma3ForCausalLM",
    sizes=_WINDOW,
    numbers={"rope_local_base_freq": "rope.freq_base_swa"},
    defaults={"rope_local_base_freq": 10000.0},
    # llama.cpp caps no logits where layers have windows.
    implied=lambda config: {**_gemma(62)(config), "final_logit_softcapping": None},
    offset=True,
    period=6,
    apart=True,
)
_COHERE = Architecture(
    "command-r",
    "cohere",
    "CohereForCausalLM",
    numbers=_LOGIT_SCALE,
    epsilon=("layer_norm_eps", "attention.layer_norm_epsilon"),
    square=True,
    tied=True,
)
_EXPERTS = {"num_experts_per_tok": "expert_used_count"}

# The first that fits a file is taken: of one name, that without a sign comes last.
ARCHITECTURES = (
    Architecture(
        "llama",
        "mixtral",
        "MixtralForCausalLM",
        sign="expert_count",
        sizes={**_EXPERTS, "num_local_experts": "expert_count"},
        implied=lambda _: {"sliding_window": None},
        interleaved=True,
    ),
    Architecture("llama", "llama", "LlamaForCausalLM", interleaved=True),
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", square=True),
    Architecture("qwen3", "qwen3", "Qwen3ForCausalLM"),
    Architecture(
        "qwen3moe",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        sizes={
            **_EXPERTS,
            "num_experts": "expert_count",
            "moe_intermediate_size": "expert_feed_forward_length",
        },
        implied=lambda _: {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    # Every fourth layer without rotary positions, which no field says.
    Architecture("smollm3", "smollm3", "SmolLM3ForCausalLM", interleaved=True),
    Architecture(
        "granite",
        "granite",
        "GraniteForCausalLM",
        numbers={
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "attention_multiplier": "attention.scale",
            "logits_scaling": "logit_scale",
        },
        interleaved=True,
    ),
    _GEMMA2,
    _GEMMA3,
    Architecture(
        "olmo2",
        "olmo3",
        "Olmo3ForCausalLM",
        sign="attention.sliding_window",
        sizes=_WINDOW,
        square=True,
        tied=False,
        period=4,
        apart=True,
    ),
    Architecture("olmo2", "olmo2", "Olmo2ForCausalLM", square=True, tied=False),
    _COHERE,
    Architecture(
        "cohere2",
        "cohere2",
        "Cohere2ForCausalLM",
        sizes=_WINDOW,
        numbers=_LOGIT_SCALE,
        epsilon=_COHERE.epsilon,
        square=True,
        tied=True,
        period=4,
    ),
    Architecture("phi3", "phi3", "Phi3ForCausalLM", square=True, partial=True),
)

# Mistral's models are Llama's, but for a window, which llama.cpp does not have.
_AS = {"mistral": "llama"}


def of_family(family: str) -> Architecture | None:
    """The architecture of a family's GGUF files; None: there is none here."""
    family = _AS.get(family, family)
    return next((known for known in ARCHITECTURES if known.family == family), None)


def longest_text(config: DecoderConfig) -> int:
    """The longest text that a GGUF file says a model reads, in tokens.

    Up to its window's length, a model with one is the same as without, which is all that some
    architectures can say.
    """
    architecture, longest = of_family(config.family), config.max_position_embeddings
    if architecture is None or "sliding_window" in architecture.sizes:
        return longest
    return min(longest, config.sliding_window or longest)


def settings(config: DecoderConfig) -> dict[str, Any]:
    """What a ``config.json`` of the model may say, by name."""
    near = [kind for kind in config.kinds if kind.window is not None]
    local = [kind.rope for kind in near if kind.rope is not None]
    rope = main_rope(config)
    return {
        **{each.name: getattr(config, each.name) for each in fields(config)},
        "layer_norm_eps": config.rms_norm_eps,
        "logits_scaling": 1 / config.logit_scale,
        "num_local_experts": config.num_experts,
        "sliding_window": near[0].window if near else None,
        "rope_theta": rope.theta,
        "rope_local_base_freq": local[0].theta if local else rope.theta,
    }


def relaid(
    value: np.ndarray, name: str, architecture: Architecture, config: DecoderConfig, *, back: bool
) -> np.ndarray:
    """A tensor of Hugging Face's, in float32, as a GGUF file holds it.

    Args:
      value: the tensor, float32; a matrix is [out, in].
      name: GGUF's name of it, with ``{i}`` for the layer.
      architecture: of the file.
      config: of the model.
      back: the other way round.

    Returns:
      An array of the same shape.
    """
    if architecture.offset and name.endswith("norm.weight"):
        return value - np.float32(1) if back else value + np.float32(1)
    heads = {
        "blk.{i}.attn_q.weight": config.num_attention_heads,
        "blk.{i}.attn_k.weight": config.num_key_value_heads,
    }.get(name)
    if not architecture.interleaved or heads is None:
        return value
    # llama.cpp turns pairs of neighbours, Hugging Face pairs of halves.
    pairs = (heads, -1, 2) if back else (heads, 2, -1)
    return value.reshape(*pairs, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)


def main_rope(config: DecoderConfig) -> Rope:
    """The rotary positions of layers without a window, or else of the others."""
    found = sorted(
        (kind for kind in config.kinds if kind.rope is not None),
        key=lambda kind: kind.window is not None,
    )
    return (found[0].rope if found else None) or Rope(config.rope_theta)
