"""A GGUF file becomes a Hugging Face directory.

Quantised tensors are dequantised to float32. The format: docs/gguf.md of
https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize

from jaxmoo.errors import CheckpointError, JaxmooError, did_you_mean, shown
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf.directory import check_target, new_directory
from jaxmoo.hf.gguf_fields import Fields, open_gguf
from jaxmoo.hf.gguf_tokenizer import gguf_tokenizer
from jaxmoo.hf.load import check_tensors
from jaxmoo.hf.save import Tensor, write_weights
from jaxmoo.hf.tokenizer import load_tokenizer
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.decoder import Decoder
from jaxmoo.models.layers import rope_frequencies

__all__ = [
    "GRANITE_SCALES",
    "INTERLEAVED",
    "LAYER_PARTS",
    "PREFIXES",
    "ROPE_FACTORS",
    "convert_gguf",
    "gguf_config",
    "stretched",
]

# GGUF's names of tensors and parts of tensors' names, and Hugging Face's.
PREFIXES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    # Every fourth layer without rotary positions, which no field says.
    "smollm3": "SmolLM3ForCausalLM",
    "granite": "GraniteForCausalLM",
}
# Architectures of which llama.cpp interleaves the two halves of every query and key head.
INTERLEAVED = ("llama", "smollm3", "granite")
# Granite's multipliers, by their names in a config.json and in GGUF files.
GRANITE_SCALES = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
# Llama 3's stretched rotary frequencies: GGUF files hold what each is divided by.
ROPE_FACTORS = "rope_freqs.weight"


def convert_gguf(file: Path, path: Path) -> None:
    """Convert a GGUF file of an architecture that is known into a Hugging Face directory.

    Args:
      file: the GGUF file, of Llama, Qwen2, Qwen3, SmolLM3 or Granite; its tensors may be of any
        type that the ``gguf`` package dequantises, among them F32, F16, BF16, Q4_0 to Q8_0 and the
        K-quants.
      path: the directory to make: config, float32 weights, tokenizer with its chat template and
        generation config. It appears only when all is written, and can be loaded.

    Raises:
      CheckpointError: when the file is damaged or of another architecture or tokenizer, its
        tensors are not those of a whole model, or ``path`` is not empty.
    """
    file = typed_path(file)
    check_target(typed_path(path))
    try:
        config, tensors, (tokenizer, tokenizer_config) = _read(file)
    except JaxmooError as error:
        raise CheckpointError(f"{file}: {error}") from error
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with new_directory(path) as directory:
        write_weights(directory, tensors)
        for name, content in {
            "config.json": config,
            "generation_config.json": special,
            "tokenizer_config.json": tokenizer_config,
        }.items():
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (directory / name).write_text(text + "\n", "utf-8")
        (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
        try:  # what is written must be a model for everything that reads it
            load_tokenizer(directory)
        except JaxmooError as error:
            raise CheckpointError(f"{file} gives no model: {error}") from error


def _read(file: Path) -> tuple[dict[str, Any], list[Tensor], tuple[Any, dict[str, Any]]]:
    """Contents of ``config.json``, tensors, and tokenizer with its config; all is checked."""
    fields, found = open_gguf(file)
    architecture = fields.text("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(
            f"the architecture {shown(architecture)}, which the file has, cannot be converted."
            f"{did_you_mean(architecture, _ARCHITECTURES)} Supported: "
            f"{', '.join(_ARCHITECTURES)}"
        )
    stored = {tensor.name: tensor for tensor in found}
    factors = stored.pop(ROPE_FACTORS, None)
    config = gguf_config(architecture, fields, tied="output.weight" not in stored)
    if factors is not None:
        config |= stretched(config, np.array(factors.data, np.float32))
    decoder = DecoderConfig.from_hf(config)
    tokenizer = gguf_tokenizer(fields, decoder.max_position_embeddings)
    tensors = [_tensor(tensor, config, file) for tensor in stored.values()]
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    check_tensors(shapes, nnx.state(Decoder.abstract(decoder)), decoder, file)
    return config, tensors, tokenizer


def gguf_config(architecture: str, fields: Fields, *, tied: bool) -> dict[str, Any]:
    """Return what ``config.json`` says of the model of a header.

    Args:
      architecture: GGUF's name of it.
      fields: of the header.
      tied: whether the head is the embedding.

    Raises:
      CheckpointError: a field is missing, of another type or out of range, or asks for what cannot
        be converted.
    """

    def key(name: str) -> str:
        return f"{architecture}.{name}"

    heads, hidden = fields.size(key("attention.head_count")), fields.size(key("embedding_length"))
    theta = fields.number(key("rope.freq_base"), 10000.0)
    head_dim = fields.size(key("attention.key_length"), hidden // heads)
    tokens = fields.texts("tokenizer.ggml.tokens")
    for name, supported in {
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
        "rope.scale_linear": 1.0,
        "rope.dimension_count": head_dim,
        "attention.value_length": head_dim,
        "attention.sliding_window": 0,
        "expert_count": 0,
    }.items():
        found = fields.get(key(name), supported)
        if found != supported:
            raise CheckpointError(
                f"GGUF files with {key(name)}={shown(found)} cannot be converted "
                f"(only {supported!r})"
            )
    scales = GRANITE_SCALES if architecture == "granite" else {}
    return {
        **{ours: _shortest(fields.number(key(theirs))) for ours, theirs in scales.items()},
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": len(tokens),
        "hidden_size": hidden,
        "intermediate_size": fields.size(key("feed_forward_length")),
        "num_hidden_layers": fields.size(key("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.size(key("attention.head_count_kv"), heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": fields.size(key("context_length")),
        "rms_norm_eps": _shortest(fields.number(key("attention.layer_norm_rms_epsilon"))),
        # Both spellings: transformers 4 reads the first and ignores the second.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields.token("tokenizer.ggml.bos_token_id", tokens, None),
        "eos_token_id": fields.token("tokenizer.ggml.eos_token_id", tokens),
        "pad_token_id": fields.token("tokenizer.ggml.padding_token_id", tokens, None),
        "torch_dtype": "float32",
    }


def stretched(config: dict[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """Return the settings of Llama 3's stretched rotary frequencies, in both spellings.

    Args:
      config: the other settings.
      factors: what each frequency is divided by.

    Raises:
      CheckpointError: these are not the factors of Llama 3's rule.
    """
    if not factors.size:
        raise CheckpointError(f"{ROPE_FACTORS} is empty")
    # Of the four numbers of Llama 3's rule all its models share three.
    scaling = {
        "rope_type": "llama3",
        "factor": _shortest(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    parameters = {**scaling, "rope_theta": config["rope_theta"]}
    settings = {"rope_scaling": scaling, "rope_parameters": parameters}
    slowed = DecoderConfig.from_hf(config | settings)
    plain = dataclasses.replace(slowed, rope_scaling=None)
    expected = rope_frequencies(plain) / rope_frequencies(slowed)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError(
            f"{ROPE_FACTORS} does not hold Llama 3's factors; other stretched rotary frequencies "
            "cannot be converted"
        )
    return settings


def _shortest(value: float) -> float:
    """Undo the widening of a float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _tensor(tensor: Any, config: dict[str, Any], file: Path) -> Tensor:
    """A tensor of the GGUF file under its Hugging Face name."""
    match = re.fullmatch(r"(?s)(?:blk\.(\d+)\.)?(.*?)(\.\w+)?", tensor.name)
    assert match is not None  # it fits any text
    layer, part, leaf = match.groups()
    known = PREFIXES if layer is None else LAYER_PARTS
    if part not in known or leaf not in (".weight", ".bias"):
        raise CheckpointError(
            f"tensor {tensor.name!r} is not part of the {config['model_type']} architecture"
        )
    prefix = known[part] if layer is None else f"model.layers.{layer}.{known[part]}"
    heads = None
    if config["model_type"] in INTERLEAVED and layer is not None:
        heads = {
            "attn_q": config["num_attention_heads"],
            "attn_k": config["num_key_value_heads"],
        }.get(part)
    kind = tensor.tensor_type

    def read() -> np.ndarray:
        with np.errstate(all="ignore"):
            value = dequantize(tensor.data, kind).astype(np.float32, copy=False)
        if not np.isfinite(value).all():
            raise CheckpointError(
                f"{file} is damaged: tensor {tensor.name!r} holds values that are not finite"
            )
        if heads is None:
            return value
        return value.reshape(heads, -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        raise CheckpointError(f"tensor {tensor.name!r} is of type {kind.name}: {error}") from error
    shape = tuple(map(int, tensor.shape[::-1]))
    return Tensor(f"{prefix}{leaf}", shape, np.dtype(np.float32), read)
