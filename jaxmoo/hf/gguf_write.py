"""A `Decoder` becomes a GGUF file, as llama.cpp's own converter makes it.

What the reader in `jaxmoo.hf.gguf` knows is written by its own tables, and read back by it before
the first tensor is written: what the format cannot say is refused. The format:
https://github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape, quantize

from jaxmoo.errors import CheckpointError, ConfigError, JaxmooError
from jaxmoo.hf.gguf import (
    GRANITE_SCALES,
    INTERLEAVED,
    LAYER_PARTS,
    PREFIXES,
    ROPE_FACTORS,
    gguf_config,
    stretched,
)
from jaxmoo.hf.gguf_fields import Fields
from jaxmoo.hf.gguf_tokenizer import gguf_tokenizer, tokenizer_fields
from jaxmoo.hf.load import progress
from jaxmoo.hf.save import Tensor, check_space, model_tensors
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.decoder import Decoder
from jaxmoo.models.layers import rope_frequencies
from jaxmoo.models.rope import Llama3Rope

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["KINDS", "save_gguf"]

_Kind = GGMLQuantizationType

# Types that matrices are written in, by name: the type, and what llama.cpp calls such a file.
KINDS: Mapping[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (_Kind.F32, LlamaFileType.ALL_F32),
    "f16": (_Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (_Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (_Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_OWN = ("smollm3", "granite")  # whose architecture is called as the family
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", *_OWN)
_OF_DTYPE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# Of the layout of quantised types; llama.cpp has known no other since 2023.
_QUANTISATION_VERSION = 2

_U32, _F32, _TEXT = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING


class _Stored(NamedTuple):
    """A tensor as the file holds it."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], np.ndarray]


def save_gguf(
    model: Decoder,
    path: Path,
    *,
    tokenizer: PreTrainedTokenizerFast,
    dtypes: Mapping[str, str],
    kind: str | None = None,
    stop: Sequence[int] = (),
    name: str = "model",
) -> None:
    """Write a model, its tokenizer and its chat template as one GGUF file.

    Vectors (norms and biases) are float32, as llama.cpp wants them. The file appears when all of
    it is written; tensors are gathered, converted and written one at a time.

    Args:
      model: the decoder, of the Llama, Mistral, Qwen2, Qwen3, SmolLM3 or Granite architecture.
      path: the file to make.
      tokenizer: its tokenizer, with the chat template.
      dtypes: dtype of each Hugging Face tensor, which is written from it.
      kind: type of the matrices, one of :data:`KINDS`; by default that of the embedding's dtype. In
        ``q8_0``, a matrix whose rows are no multiple of 32 long is float16.
      stop: tokens that end a reply beside the tokenizer's own end token.
      name: what the model is called.

    Raises:
      ConfigError: there is no such kind.
      CheckpointError: the format cannot hold the model or its tokenizer, the disk is too small, or
        a value does not fit the kind.
    """
    _check_family(model.config)
    kind = kind or _OF_DTYPE.get(dtypes["model.embed_tokens.weight"], "f32")
    if kind not in KINDS:
        raise ConfigError(f"GGUF files are written in {', '.join(KINDS)}, found {kind!r}.")
    config = model.config
    architecture = "qwen3" if config.qk_norm else "qwen2" if config.attention_bias else "llama"
    architecture = config.family if config.family in _OWN else architecture
    fields = _fields(config, architecture, kind, name)
    fields |= tokenizer_fields(tokenizer, config.vocab_size, stop)
    tensors = [
        _stored(tensor, config, architecture, KINDS[kind][0])
        for tensor in model_tensors(model, dtypes.__getitem__)
    ]
    factors = None if config.rope_scaling is None else _rope_factors(config, architecture)
    if factors is not None:
        tensors.insert(0, _Stored(ROPE_FACTORS, factors.shape, _Kind.F32, lambda: factors))
    _check(config, architecture, fields, factors)
    _write(path, architecture, fields, tensors)


def _check_family(config: DecoderConfig) -> None:
    """Raise unless GGUF files are written of such models."""
    scaling = config.rope_scaling
    other_rope = scaling is not None and not isinstance(scaling, Llama3Rope)
    # Of SmolLM3 the layers that differ are always the same.
    differ = config.layer_kinds and config.family != "smollm3"
    if config.family not in _FAMILIES or differ or other_rope:
        raise CheckpointError(
            f"GGUF files are written of {', '.join(_FAMILIES)} models whose layers are alike and "
            "whose rotary frequencies are plain or stretched as Llama 3's; this is a "
            f"{config.family} model with others. Export a Hugging Face directory instead."
        )


def _fields(
    config: DecoderConfig, architecture: str, kind: str, name: str
) -> dict[str, tuple[Any, ...]]:
    """Fields of the header but for the tokenizer's: values with their types."""
    # Up to the window's length, a model with one is the same as without.
    context = min(config.max_position_embeddings, config.sliding_window or 2**31)
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": context,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    numbers = {
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": _theta(config),
    }
    if architecture == "granite":
        found = {**dataclasses.asdict(config), "logits_scaling": 1 / config.logit_scale}
        numbers |= {theirs: found[ours] for ours, theirs in GRANITE_SCALES.items()}
    return {
        "general.type": ("model", _TEXT),
        "general.name": (name, _TEXT),
        "general.file_type": (int(KINDS[kind][1]), _U32),
        "general.quantization_version": (_QUANTISATION_VERSION, _U32),
        **{f"{architecture}.{key}": (size, _U32) for key, size in sizes.items()},
        **{f"{architecture}.{key}": (float(x), _F32) for key, x in numbers.items()},
    }


def _theta(config: DecoderConfig) -> float:
    ropes = [kind.rope for kind in config.kinds if kind.rope is not None]
    return ropes[0].theta if ropes else config.rope_theta


def _rope_factors(config: DecoderConfig, architecture: str) -> np.ndarray:
    """What each rotary frequency is divided by, which llama.cpp reads for one architecture."""
    if architecture != "llama":
        raise CheckpointError(
            f"GGUF files of the {architecture} architecture cannot hold stretched rotary "
            f"frequencies ({config.rope_scaling})"
        )
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    return (plain / rope_frequencies(config)).astype(np.float32)


def _check(
    config: DecoderConfig,
    architecture: str,
    fields: Mapping[str, tuple[Any, ...]],
    factors: np.ndarray | None,
) -> None:
    """Raise unless the fields say all that there is to say about the model."""
    wide = config.num_attention_heads * config.head_dim
    if architecture == "qwen2" and wide != config.hidden_size:
        raise CheckpointError(
            f"GGUF files of the qwen2 architecture cannot hold heads of width {config.head_dim}: "
            f"for llama.cpp, {config.num_attention_heads} of them are "
            f"hidden_size={config.hidden_size}"
        )
    found = Fields({key: value for key, (value, *_) in fields.items()})
    try:
        read = gguf_config(architecture, found, tied=config.tie_word_embeddings)
        if factors is not None:
            read |= stretched(read, factors)
        same = DecoderConfig.from_hf(read)
        gguf_tokenizer(found, same.max_position_embeddings)
    except JaxmooError as error:
        raise CheckpointError(f"a GGUF file cannot hold this model: {error}") from error
    # A family is known by the names of its tensors, which are looked up one by one.
    expected = dataclasses.replace(
        config,
        family=same.family,
        max_position_embeddings=same.max_position_embeddings,
        sliding_window=None,
    )
    differing = [
        f"{field.name}={getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if getattr(same, field.name) != getattr(expected, field.name)
    ]
    if differing:
        raise CheckpointError(
            f"GGUF files of the {architecture} architecture cannot hold a model with "
            f"{', '.join(differing)}. llama.cpp's own convert_hf_to_gguf.py knows more of them: "
            "give it a Hugging Face directory (`jaxmoo convert to-hf`)."
        )


_FROM_HF = {theirs: ours for ours, theirs in PREFIXES.items()}
_FROM_HF |= {theirs: ours for ours, theirs in LAYER_PARTS.items()}


def _stored(
    tensor: Tensor, config: DecoderConfig, architecture: str, kind: GGMLQuantizationType
) -> _Stored:
    """A tensor under its name in GGUF files, in the layout and type that it has there."""
    match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*)(\.\w+)", tensor.name)
    part = None if match is None else _FROM_HF.get(match[2])
    if match is None or part is None:
        raise CheckpointError(f"GGUF files of {architecture} models have no tensor {tensor.name!r}")
    name = f"{part}{match[3]}" if match[1] is None else f"blk.{match[1]}.{part}{match[3]}"
    heads = None
    if architecture in INTERLEAVED:
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        heads = heads.get(part)
    if len(tensor.shape) == 1:
        kind = _Kind.F32
    elif tensor.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = _Kind.F16

    def read() -> np.ndarray:
        value = np.asarray(tensor.read()).astype(np.float32)
        if heads is not None:
            # llama.cpp turns pairs of neighbours, Hugging Face pairs of halves.
            halves = value.reshape(heads, 2, -1, value.shape[-1])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        with np.errstate(over="ignore"):
            found = quantize(np.ascontiguousarray(value), kind)
        if kind == _Kind.F16 and np.isinf(found).any() and not np.isinf(value).any():
            raise CheckpointError(
                f"{tensor.name} has values beyond the range of float16; write bf16, f32 or q8_0"
            )
        return found

    return _Stored(name, tensor.shape, kind, read)


def _write(
    path: Path,
    architecture: str,
    fields: Mapping[str, tuple[Any, ...]],
    tensors: Sequence[_Stored],
) -> None:
    writer = GGUFWriter(None, architecture)
    for key, (value, *kinds) in fields.items():
        writer.add_key_value(key, value, *kinds)
    total = 0
    for tensor in tensors:
        per_block, size = GGML_QUANT_SIZES[tensor.kind]
        nbytes = int(np.prod(tensor.shape)) // per_block * size
        plain = {_Kind.F32: np.float32, _Kind.F16: np.float16}.get(tensor.kind)
        shape = tensor.shape
        if plain is None:
            shape = quant_shape_to_byte_shape(shape, tensor.kind)
        writer.add_tensor_info(
            tensor.name, shape, np.dtype(plain or np.uint8), nbytes, raw_dtype=tensor.kind
        )
        total += nbytes
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        check_space(partial.parent, total)
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress(total, "Writing weights") as bar:
            for tensor in tensors:
                value = tensor.read()
                writer.write_tensor_data(value)
                bar.update(value.nbytes)
        writer.close()
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written: {error}. Nothing was left behind. Check that the disk "
            "has room and the path can be written to."
        ) from error
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
