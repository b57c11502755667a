"""A GGUF file of the Llama architecture becomes a Hugging Face directory.

Quantised tensors are dequantised to float32. The format: https://github.com/ggml-org/ggml,
docs/gguf.md.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from tokenizers import decoders, models, pre_tokenizers

from jaxmoo.errors import CheckpointError, did_you_mean
from jaxmoo.hf.directory import new_directory
from jaxmoo.hf.save import Tensor, write_weights

__all__ = ["convert_gguf"]

# GGUF's tensor names; {i} is a layer's number.
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.{i}.attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blk.{i}.attn_q.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "blk.{i}.attn_k.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "blk.{i}.attn_v.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "blk.{i}.attn_output.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "blk.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blk.{i}.ffn_gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "blk.{i}.ffn_up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "blk.{i}.ffn_down.weight": "model.layers.{i}.mlp.down_proj.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

# How text is split before merging, by GGUF's name for it. SmolLM: every digit on its own.
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
}


def convert_gguf(file: Path, path: Path) -> None:
    """Convert a GGUF file of the Llama architecture into a Hugging Face directory.

    Args:
      file: the GGUF file.
      path: the directory to make: config, float32 weights, tokenizer with its chat template and
        generation config. It appears only when all is written.

    Raises:
      CheckpointError: when the file is damaged or of another architecture or tokenizer, or
        ``path`` is not empty.
    """
    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    # A damaged file fails in many ways inside the reader, none of them its own.
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise CheckpointError(f"{file} is not a GGUF file, or is damaged: {error}") from error
    if fields.get("general.architecture") != "llama":
        raise CheckpointError(
            f"{file} has architecture {fields.get('general.architecture')!r}; only 'llama' can be "
            "converted"
        )
    try:
        config = _config(fields, tied=all(t.name != "output.weight" for t in reader.tensors))
        tokenizer, tokenizer_config = _tokenizer(fields)
        tensors = [_tensor(tensor, config) for tensor in reader.tensors]
    except KeyError as error:
        raise CheckpointError(f"{file} lacks {error}") from error
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
        tokenizer.save(str(directory / "tokenizer.json"))


def _config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    hidden = fields["llama.embedding_length"]
    theta = float(fields.get("llama.rope.freq_base", 10000.0))
    if any(key.startswith("llama.rope.scaling") for key in fields):
        raise CheckpointError("GGUF files with scaled rotary frequencies cannot be converted")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields.get("llama.attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": _shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        # Both spellings: transformers 4 reads the first and ignores the second.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def _shortest(value: float) -> float:
    """Undo the widening of a float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _tensor(tensor: Any, config: dict[str, Any]) -> Tensor:
    """A tensor of the GGUF file under its Hugging Face name."""
    match = re.match(r"blk\.(\d+)\.", tensor.name)
    number = match.group(1) if match else ""
    template = re.sub(r"^blk\.\d+\.", "blk.{i}.", tensor.name)
    if template not in _NAMES:
        raise CheckpointError(f"tensor {tensor.name!r} is not part of the Llama architecture")
    # llama.cpp interleaves the two halves of every query and key head.
    heads = {
        "blk.{i}.attn_q.weight": config["num_attention_heads"],
        "blk.{i}.attn_k.weight": config["num_key_value_heads"],
    }.get(template)

    def read() -> np.ndarray:
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if heads is None:
            return value
        return value.reshape(heads, -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)

    name = _NAMES[template].replace("{i}", number)
    return Tensor(name, tuple(map(int, tensor.shape[::-1])), np.dtype(np.float32), read)


def _tokenizer(fields: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    pre = fields.get("tokenizer.ggml.pre")
    if fields["tokenizer.ggml.model"] != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"tokenizer {fields['tokenizer.ggml.model']!r} with pre-tokenizer {pre!r} cannot be "
            f"converted.{did_you_mean(str(pre), _PRE_TOKENIZERS)} Supported: 'gpt2' with "
            f"{', '.join(map(repr, _PRE_TOKENIZERS))}"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]],
        )
    )
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([token for token, kind in kinds if kind == TokenType.CONTROL])
    config = {
        # The class that takes tokenizer.json as it is, in transformers 4 and 5 alike.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        number = fields.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            config[f"{name}_token"] = tokens[number]
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return tokenizer, config
