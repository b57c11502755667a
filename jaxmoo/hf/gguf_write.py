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
from jaxmoo.hf.gguf import gguf_config
from jaxmoo.hf.gguf_architectures import (
    ARCHITECTURES,
    Architecture,
    longest_text,
    main_rope,
    of_family,
    relaid,
    settings,
)
from jaxmoo.hf.gguf_fields import Fields
from jaxmoo.hf.gguf_rope import plain_yarn, scaling_fields
from jaxmoo.hf.gguf_tokenizer import gguf_tokenizer, tokenizer_fields
from jaxmoo.hf.load import progress
from jaxmoo.hf.names import template
from jaxmoo.hf.save import Tensor, check_space, model_tensors
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.decoder import Decoder

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
_OF_DTYPE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# Of the layout of quantised types; llama.cpp has known no other since 2023.
_QUANTISATION_VERSION = 2

# In float32 whatever the type of the file, as llama.cpp wants it.
_ROUTER = "blk.{i}.ffn_gate_inp.weight"

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

    Vectors (norms and biases) and routers are float32, as llama.cpp wants them. The file appears
    when all of it is written; tensors are gathered, converted and written one at a time.

    Args:
      model: the decoder, of a family in `ARCHITECTURES`, or Mistral.
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
    config, architecture = model.config, of_family(model.config.family)
    if architecture is None:
        families = ", ".join(known.family for known in ARCHITECTURES)
        raise CheckpointError(
            f"GGUF files are written of {families} and mistral models; this one is "
            f"{config.family}. Export a Hugging Face directory instead."
        )
    kind = kind or _OF_DTYPE.get(dtypes["model.embed_tokens.weight"], "f32")
    if kind not in KINDS:
        raise ConfigError(f"GGUF files are written in {', '.join(KINDS)}, found {kind!r}.")
    scaling, factors = scaling_fields(main_rope(config), config.rotary_width, architecture)
    fields = _fields(config, architecture, kind, name, scaling)
    fields |= tokenizer_fields(tokenizer, config.vocab_size, stop)
    _check(config, architecture, fields, factors)
    tensors = [
        _Stored(key, value.shape, _Kind.F32, lambda value=value: value)
        for key, value in factors.items()
    ]
    found: dict[str, list[Tensor]] = {}  # by the names in the file; of experts, all
    for tensor in model_tensors(model, dtypes.__getitem__):
        found.setdefault(_name(tensor.name, architecture), []).append(tensor)
    tensors += [
        _stored(key, parts, config, architecture, KINDS[kind][0]) for key, parts in found.items()
    ]
    _write(path, architecture.name, fields, tensors)


def _fields(
    config: DecoderConfig,
    architecture: Architecture,
    kind: str,
    name: str,
    scaling: Mapping[str, Any],
) -> dict[str, tuple[Any, ...]]:
    """Fields of the header but for the tokenizer's: values with their types."""
    known = settings(config)
    epsilon, its_field = architecture.epsilon
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": longest_text(config),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.rotary_width,
        "vocab_size": config.vocab_size,
        its_field: float(known[epsilon]),
        "rope.freq_base": float(known["rope_theta"]),
        **{key: known[name] for name, key in architecture.sizes.items() if known[name]},
        **{key: float(known[name]) for name, key in architecture.numbers.items() if known[name]},
        **scaling,
    }
    types = {int: _U32, float: _F32, str: _TEXT}
    return {
        "general.type": ("model", _TEXT),
        "general.name": (name, _TEXT),
        "general.file_type": (int(KINDS[kind][1]), _U32),
        "general.quantization_version": (_QUANTISATION_VERSION, _U32),
        **{
            f"{architecture.name}.{key}": (value, types[type(value)])
            for key, value in numbers.items()
        },
    }


def _check(
    config: DecoderConfig,
    architecture: Architecture,
    fields: Mapping[str, tuple[Any, ...]],
    factors: Mapping[str, np.ndarray],
) -> None:
    """Raise unless the fields say all that there is to say about the model."""
    found = Fields({key: value for key, (value, *_) in fields.items()})
    try:
        tied = config.tie_word_embeddings
        same = DecoderConfig.from_hf(gguf_config(architecture, found, tied=tied, factors=factors))
        gguf_tokenizer(found, same.max_position_embeddings)
    except JaxmooError as error:
        raise CheckpointError(
            f"a GGUF file cannot hold this model: {str(error).rstrip('.')}. Export a Hugging Face "
            "directory instead."
        ) from error
    expected = _canonical(config)
    # A family is known by the names of its tensors, which are looked up one by one. A router's
    # loss is a matter of training.
    ignored = {"family", "router_aux_loss_coef"}
    if "sliding_window" not in architecture.sizes:
        ignored |= {"sliding_window", "max_position_embeddings"}
    differing = [
        f"{name}={getattr(config, name)}"
        for name, value in _canonical(same).items()
        if name not in ignored and value != expected[name]
    ]
    if differing:
        raise CheckpointError(
            f"GGUF files of the {architecture.name} architecture cannot hold a model with "
            f"{', '.join(differing)}. Export a Hugging Face directory instead."
        )


def _canonical(config: DecoderConfig) -> dict[str, Any]:
    """A config's fields, those that mean the same being the same; numbers as in a file, float32."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return float(np.float32(value))
        if isinstance(value, tuple | list):
            return [plain(one) for one in value]
        if dataclasses.is_dataclass(value):
            value = plain_yarn(value)
            return {
                "": type(value),
                **{
                    each.name: plain(getattr(value, each.name))
                    for each in dataclasses.fields(value)
                },
            }
        return value

    return plain(config)


def _name(name: str, architecture: Architecture) -> str:
    """A tensor's name in GGUF files."""
    key, numbers = template(name)
    for theirs, ours in architecture.tensors.items():
        if ours == key:
            return theirs.replace("{i}", numbers.get("{i}", ""))
    raise CheckpointError(f"GGUF files of {architecture.name} models have no tensor {name!r}")


def _stored(
    name: str,
    parts: Sequence[Tensor],
    config: DecoderConfig,
    architecture: Architecture,
    kind: GGMLQuantizationType,
) -> _Stored:
    """A tensor, or one of the tensors of all experts, in the layout and type of the file."""
    key = re.sub(r"^blk\.\d+\.", "blk.{i}.", name)
    shape = parts[0].shape if len(parts) == 1 else (len(parts), *parts[0].shape)
    if len(shape) == 1 or key == _ROUTER:
        kind = _Kind.F32
    elif shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = _Kind.F16

    def read_one(tensor: Tensor) -> np.ndarray:
        value = np.asarray(tensor.read()).astype(np.float32)
        value = relaid(value, key, architecture, config, back=False)
        with np.errstate(over="ignore"):
            found = quantize(np.ascontiguousarray(value), kind)
        if kind == _Kind.F16 and np.isinf(found).any() and not np.isinf(value).any():
            raise CheckpointError(
                f"{tensor.name} has values beyond the range of float16; write bf16, f32 or q8_0"
            )
        return found

    def read() -> np.ndarray:
        return read_one(parts[0]) if len(parts) == 1 else np.stack([read_one(x) for x in parts])

    return _Stored(name, shape, kind, read)


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
