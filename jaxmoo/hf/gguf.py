"""A GGUF file becomes a Hugging Face directory.

Quantised tensors are dequantised to float32. The format: docs/gguf.md of
https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from jaxmoo.errors import CheckpointError, JaxmooError, did_you_mean, shown
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf.directory import check_target, new_directory
from jaxmoo.hf.gguf_architectures import ARCHITECTURES, Architecture, relaid
from jaxmoo.hf.gguf_fields import Fields, open_gguf
from jaxmoo.hf.gguf_rope import FACTORS, read_scaling, shortest
from jaxmoo.hf.gguf_tokenizer import gguf_tokenizer
from jaxmoo.hf.load import check_tensors
from jaxmoo.hf.names import numbered
from jaxmoo.hf.save import Tensor, write_weights
from jaxmoo.hf.tokenizer import load_tokenizer
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.decoder import Decoder

__all__ = ["convert_gguf", "gguf_config"]


def convert_gguf(file: Path, path: Path) -> None:
    """Convert a GGUF file of an architecture that is known into a Hugging Face directory.

    Args:
      file: the GGUF file, of an architecture in `ARCHITECTURES`; its tensors may be of any type
        that the ``gguf`` package dequantises, among them F32, F16, BF16, Q4_0 to Q8_0 and the
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
    architecture = _architecture(fields)
    stored = {tensor.name: tensor for tensor in found}
    factors = {name: _factors(stored.pop(name)) for name in FACTORS if name in stored}
    tied = "output.weight" not in stored
    config = gguf_config(architecture, fields, tied=tied, factors=factors)
    decoder = DecoderConfig.from_hf(config)
    tokenizer = gguf_tokenizer(fields, decoder.max_position_embeddings)
    tensors = [
        tensor for one in stored.values() for tensor in _tensors(one, architecture, decoder, file)
    ]
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    check_tensors(shapes, nnx.state(Decoder.abstract(decoder)), decoder, file)
    return config, tensors, tokenizer


def _architecture(fields: Fields) -> Architecture:
    name = fields.text("general.architecture")
    header = fields.under(f"{name}.")
    for known in ARCHITECTURES:
        if known.name == name and (known.sign is None or header.get(known.sign, 0)):
            return known
    names = list(dict.fromkeys(known.name for known in ARCHITECTURES))
    raise CheckpointError(
        f"the architecture {shown(name)}, which the file has, cannot be converted."
        f"{did_you_mean(name, names)} Supported: {', '.join(names)}"
    )


def _factors(tensor: Any) -> np.ndarray:
    if tensor.tensor_type != GGMLQuantizationType.F32:
        raise CheckpointError(
            f"tensor {tensor.name!r} must be of type F32, found {tensor.tensor_type.name}"
        )
    return np.array(tensor.data, np.float32)


def gguf_config(
    architecture: Architecture,
    fields: Fields,
    *,
    tied: bool,
    factors: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Return what ``config.json`` says of the model of a header.

    Args:
      architecture: of the file.
      fields: of the header.
      tied: whether the head is the embedding.
      factors: tensors that say how rotary frequencies are stretched, by their names in
        `jaxmoo.hf.gguf_rope.FACTORS`; float32 [rotated entries of a head / 2].

    Raises:
      CheckpointError: a field is missing, of another type or out of range, or asks for what cannot
        be converted.
    """
    header = fields.under(f"{architecture.name}.")
    heads, hidden = header.size("attention.head_count"), header.size("embedding_length")
    head_dim = header.size("attention.key_length", hidden // heads)
    rotated = header.size("rope.dimension_count", head_dim)
    tokens = fields.texts("tokenizer.ggml.tokens")
    theta = header.number("rope.freq_base", 10000.0)
    _check_fixed(architecture, header, heads, head_dim, tied, theta)
    epsilon, its_field = architecture.epsilon
    config = {
        "architectures": [architecture.transformers],
        "model_type": architecture.family,
        "vocab_size": len(tokens),
        "hidden_size": hidden,
        "intermediate_size": header.size("feed_forward_length"),
        "num_hidden_layers": header.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": header.size("context_length"),
        epsilon: shortest(header.number(its_field)),
        "rope_theta": theta,
        "rope_parameters": None,  # below
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields.token("tokenizer.ggml.bos_token_id", tokens, None),
        "eos_token_id": _ends(fields, tokens),
        "pad_token_id": fields.token("tokenizer.ggml.padding_token_id", tokens, None),
        "torch_dtype": "float32",
    }
    defaults = architecture.defaults
    for name, key in architecture.sizes.items():
        config[name] = header.size(key, *([defaults[name]] if name in defaults else []))
    for name, key in architecture.numbers.items():
        found = header.number(key, *([defaults[name]] if name in defaults else []))
        config[name] = shortest(found)
    config |= architecture.implied(config)
    if architecture.partial:  # which Phi-3 alone is; llama.cpp gives its models no window
        config["sliding_window"] = header.get("attention.sliding_window", 0) or None
        share = rotated / head_dim
        if int(head_dim * share) < rotated:  # which its readers take
            share = math.nextafter(share, 1)
        config["partial_rotary_factor"] = share
    return config | _rope(
        architecture, config, theta, read_scaling(header, factors, theta, rotated)
    )


def _ends(fields: Fields, tokens: Sequence[str]) -> int | list[int]:
    """The token that ends a text, and one that ends a reply, where it is another."""
    text = fields.token("tokenizer.ggml.eos_token_id", tokens)
    reply = fields.token("tokenizer.ggml.eot_token_id", tokens, text)
    assert text is not None and reply is not None
    return text if reply == text else [text, reply]


def _check_fixed(
    architecture: Architecture,
    header: Fields,
    heads: int,
    head_dim: int,
    tied: bool,
    theta: float,
) -> None:
    """Raise where a file says what its architecture has otherwise, or what would not be read."""
    hidden, name = header.size("embedding_length"), architecture.name
    supported = {key: 0 for known in ARCHITECTURES for key in known.keys} | {
        "attention.value_length": head_dim,
        "expert_weights_norm": True,
        "rope.dimension_count": head_dim,
        "rope.freq_base_swa": theta,
        "rope.scaling.finetuned": True,  # Granite's files say so that there is no rotation
    }
    read = set(architecture.keys)
    if architecture.partial:
        read |= {"rope.dimension_count", "attention.sliding_window"}
    header.require({key: value for key, value in supported.items() if key not in read})
    _check_pattern(header, architecture.period)
    if architecture.square and heads * head_dim != hidden:
        raise CheckpointError(
            f"GGUF files of the {name} architecture cannot hold heads of width {head_dim}: for "
            f"llama.cpp, {heads} of them are hidden_size={hidden}"
        )
    if architecture.tied is not None and tied != architecture.tied:
        must = "must be" if architecture.tied else "cannot be"
        raise CheckpointError(f"the head of a {name} model {must} its embedding")


def _check_pattern(header: Fields, period: int) -> None:
    """Raise unless the layers with a window are those of an architecture's period."""
    name = "attention.sliding_window_pattern"
    found = header.get(name, period)
    layers = range(1, len(found) + 1) if isinstance(found, list) else ()
    usual = [i % period != 0 for i in layers] if period else [False for _ in layers]
    if found not in (period, usual):
        header.require({name: period})


def _rope(
    architecture: Architecture,
    config: Mapping[str, Any],
    theta: float,
    scaling: dict[str, Any] | None,
) -> dict[str, Any]:
    """Rotary settings in both spellings: transformers 4 reads the first and ignores the second."""
    main = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    if architecture.partial:
        main["partial_rotary_factor"] = config["partial_rotary_factor"]
    found: dict[str, Any] = {"rope_theta": theta, "rope_parameters": main}
    if architecture.apart:
        local = {"rope_type": "default", "rope_theta": config.get("rope_local_base_freq", theta)}
        found["rope_parameters"] = {"full_attention": main, "sliding_attention": local}
    if scaling is not None:
        found["rope_scaling"] = scaling
        if scaling["rope_type"] == "longrope":  # where its models look for it
            original = "original_max_position_embeddings"
            found[original] = scaling[original]
    return found


def _tensors(
    tensor: Any, architecture: Architecture, config: DecoderConfig, file: Path
) -> list[Tensor]:
    """A tensor of the GGUF file under its Hugging Face name, or those of all experts."""
    match = re.match(r"blk\.(\d+)\.", tensor.name)
    key = tensor.name if match is None else "blk.{i}." + tensor.name[match.end() :]
    name = architecture.tensors.get(key)
    if name is None:
        raise CheckpointError(
            f"tensor {tensor.name!r} is not part of the {architecture.name} architecture"
        )
    if match is not None:
        name = numbered(name, {"{i}": match[1]})
    kind = tensor.tensor_type
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        raise CheckpointError(f"tensor {tensor.name!r} is of type {kind.name}: {error}") from error
    shape = tuple(map(int, tensor.shape[::-1]))

    def read(data: Any) -> np.ndarray:
        with np.errstate(all="ignore"):
            value = dequantize(data, kind).astype(np.float32, copy=False)
        if not np.isfinite(value).all():
            raise CheckpointError(
                f"{file} is damaged: tensor {tensor.name!r} holds values that are not finite"
            )
        return relaid(value, key, architecture, config, back=True)

    f32 = np.dtype(np.float32)
    if "{e}" not in name:
        return [Tensor(name, shape, f32, lambda: read(tensor.data))]
    return [
        Tensor(numbered(name, {"{e}": str(e)}), shape[1:], f32, lambda e=e: read(tensor.data[e]))
        for e in range(shape[0])
    ]
