"""Which Hugging Face tensor holds which parameter.

One table, read in both directions; ``{i}`` stands for a layer's number. Hugging Face stores the
matrix of a linear map as [out, in]; ours are [in, out], except for the head's, which like the
embedding is a table of one vector per token.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxmoo.errors import CheckpointError

__all__ = ["HFTensor", "hf_tensor", "logical_path"]


class HFTensor(NamedTuple):
    """A tensor of a Hugging Face checkpoint.

    Attributes:
      name: its name in the file.
      transposed: whether its two axes are swapped in comparison with the parameter.
    """

    name: str
    transposed: bool


_LINEAR = ("weight", "kernel", True)
_BIAS = ("bias", "bias", False)
_NORM = ("weight", "scale", False)
_TABLE_OF_VECTORS = ("weight", "embedding", False)

# Hugging Face's prefix, ours, and the leaves below: (its name, our name, transposed).
_TABLE = [
    ("model.embed_tokens", "embed_tokens", [_TABLE_OF_VECTORS]),
    ("model.layers.{i}.input_layernorm", "layers.{i}.input_layernorm", [_NORM]),
    ("model.layers.{i}.self_attn.q_proj", "layers.{i}.self_attn.q_proj", [_LINEAR, _BIAS]),
    ("model.layers.{i}.self_attn.k_proj", "layers.{i}.self_attn.k_proj", [_LINEAR, _BIAS]),
    ("model.layers.{i}.self_attn.v_proj", "layers.{i}.self_attn.v_proj", [_LINEAR, _BIAS]),
    ("model.layers.{i}.self_attn.q_norm", "layers.{i}.self_attn.q_norm", [_NORM]),
    ("model.layers.{i}.self_attn.k_norm", "layers.{i}.self_attn.k_norm", [_NORM]),
    ("model.layers.{i}.self_attn.o_proj", "layers.{i}.self_attn.o_proj", [_LINEAR]),
    (
        "model.layers.{i}.post_attention_layernorm",
        "layers.{i}.post_attention_layernorm",
        [_NORM],
    ),
    ("model.layers.{i}.mlp.gate_proj", "layers.{i}.mlp.gate_proj", [_LINEAR]),
    ("model.layers.{i}.mlp.up_proj", "layers.{i}.mlp.up_proj", [_LINEAR]),
    ("model.layers.{i}.mlp.down_proj", "layers.{i}.mlp.down_proj", [_LINEAR]),
    ("model.norm", "norm", [_NORM]),
    ("lm_head", "lm_head", [_TABLE_OF_VECTORS]),
]

_TO_HF = {
    f"{ours}.{leaf}": HFTensor(f"{theirs}.{their_leaf}", transposed)
    for theirs, ours, leaves in _TABLE
    for their_leaf, leaf, transposed in leaves
}
_FROM_HF = {tensor.name: path for path, tensor in _TO_HF.items()}


def hf_tensor(path: str) -> HFTensor:
    """Find the tensor that holds a parameter.

    Args:
      path: the parameter's logical path.

    Returns:
      The tensor's name and whether it is transposed.

    Raises:
      CheckpointError: when the table has no such parameter.

    Example:
      >>> hf_tensor("layers.25.mlp.up_proj.kernel")
      HFTensor(name='model.layers.25.mlp.up_proj.weight', transposed=True)
    """
    template, number = _template(path)
    if template not in _TO_HF:
        raise CheckpointError(f"parameter {path!r} has no Hugging Face name")
    tensor = _TO_HF[template]
    return tensor._replace(name=tensor.name.replace("{i}", number))


def logical_path(name: str) -> str | None:
    """Find the parameter that a tensor holds: the inverse of `hf_tensor`.

    Args:
      name: the tensor's name.

    Returns:
      The parameter's logical path, or None for a tensor the table does not have.

    Example:
      >>> logical_path("model.layers.25.mlp.up_proj.weight")
      'layers.25.mlp.up_proj.kernel'
      >>> logical_path("model.vision.patch_embed.weight") is None
      True
    """
    template, number = _template(name)
    path = _FROM_HF.get(template)
    return None if path is None else path.replace("{i}", number)


def _template(name: str) -> tuple[str, str]:
    """Replace the layer's number by a placeholder; return it too."""
    match = re.search(r"(?<=layers\.)\d+(?=\.)", name)
    if match is None:
        return name, ""
    return f"{name[: match.start()]}{{i}}{name[match.end() :]}", match.group()
