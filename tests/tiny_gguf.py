"""Small GGUF files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

SIZES = {
    "block_count": 1,
    "context_length": 8,
    "embedding_length": 4,
    "feed_forward_length": 4,
    "attention.head_count": 1,
}


def write_gguf(
    file: Path,
    architecture: str = "llama",
    *,
    pre: str = "smollm",
    sizes: dict[str, int] = SIZES,
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
    theta: float = 10000.0,
    tokens: Sequence[str] = ("<s>", "a", "b", "ab"),
    token_kinds: Sequence[int] = (3, 1, 1, 1),
    merges: Sequence[str] = ("a b",),
    fields: dict[str, tuple | None] | None = None,
    **extra: Any,
) -> Path:
    """A tiny GGUF file: a header, a whole model's tensors and more, some of them quantised.

    ``fields`` are others, each with its type, in the place of those of the same name; None is none.
    """
    kinds = kinds or {}
    hidden, wide = sizes["embedding_length"], sizes["feed_forward_length"]
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    for i in range(sizes["block_count"]):
        shapes |= {f"blk.{i}.{name}_norm": (hidden,) for name in ("attn", "ffn")}
        names = ("attn_q", "attn_k", "attn_v", "attn_output")
        shapes |= {f"blk.{i}.{name}": (hidden, hidden) for name in names}
        shapes |= {f"blk.{i}.{name}": (wide, hidden) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{i}.ffn_down": (hidden, wide)}
    tensors = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in sizes.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", pre)
    writer.add_float32(f"{architecture}.rope.freq_base", theta)
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", token_kinds)
    writer.add_array("tokenizer.ggml.merges", merges)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 0)
    for name, other in (fields or {}).items():
        writer.kv_data[0].pop(name, None)
        if other is not None:
            writer.add_key_value(name, *other)
    for name, tensor in (tensors | extra).items():
        if tensor is not None:
            writer.add_tensor(name, tensor, raw_dtype=kinds.get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
