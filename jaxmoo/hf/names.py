"""Which Hugging Face tensor holds which parameter.

One table, read in both directions; ``{i}`` stands for a layer's number, ``{e}`` for an expert's. A
family says where it has names of its own (:class:`jaxmoo.models.families.family.Names`). Hugging
Face stores the matrix of a linear map as [out, in]; ours are [in, out], except for the head's,
which like the embedding is a table of one vector per token.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxmoo.errors import CheckpointError
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.families import FAMILIES

__all__ = [
    "HFTensor",
    "constant_tensors",
    "hf_tensor",
    "logical_path",
    "numbered",
    "template",
    "templates",
]


class HFTensor(NamedTuple):
    """A tensor of a Hugging Face checkpoint, or some of its rows.

    Attributes:
      name: its name in the file.
      transposed: whether its two axes are swapped in comparison with the parameter.
      rows: the first of its rows that hold the parameter, and how many there are; None: all.
    """

    name: str
    transposed: bool
    rows: tuple[int, int] | None = None


_LINEAR = ("weight", "kernel", True)
_BIAS = ("bias", "bias", False)
_NORM = ("weight", "scale", False)
_TABLE_OF_VECTORS = ("weight", "embedding", False)

# Modules of a layer and the leaves below: (Hugging Face's name, our name, transposed).
_LAYER = {
    "input_layernorm": [_NORM],
    "self_attn.q_proj": [_LINEAR, _BIAS],
    "self_attn.k_proj": [_LINEAR, _BIAS],
    "self_attn.v_proj": [_LINEAR, _BIAS],
    "self_attn.q_norm": [_NORM],
    "self_attn.k_norm": [_NORM],
    "self_attn.o_proj": [_LINEAR],
    "post_attention_layernorm": [_NORM],
    "pre_feedforward_layernorm": [_NORM],
    "post_feedforward_layernorm": [_NORM],
    "mlp.gate_proj": [_LINEAR],
    "mlp.up_proj": [_LINEAR],
    "mlp.down_proj": [_LINEAR],
    "mlp.gate": [_LINEAR],
    "mlp.experts.{e}.gate_proj": [_LINEAR],
    "mlp.experts.{e}.up_proj": [_LINEAR],
    "mlp.experts.{e}.down_proj": [_LINEAR],
    "mlp.act_fn": [("alpha_p", "alpha_p", False), ("alpha_n", "alpha_n", False)],
}


@functools.cache
def _tables(family: str) -> tuple[dict[str, HFTensor], dict[str, str]]:
    """Tensors by our paths, and our paths by tensors' names, of one family."""
    names = FAMILIES[family].names
    modules = [
        (f"{names.prefix}embed_tokens", "embed_tokens", [_TABLE_OF_VECTORS]),
        *(
            (
                f"{names.prefix}layers.{{i}}.{names.modules.get(module, module)}",
                f"layers.{{i}}.{module}",
                leaves,
            )
            for module, leaves in _LAYER.items()
        ),
        (f"{names.prefix}norm", "norm", [_NORM]),
        (names.head, "lm_head", [_TABLE_OF_VECTORS]),
    ]
    to_hf = {
        f"{ours}.{leaf}": HFTensor(f"{theirs}.{their_leaf}", transposed)
        for theirs, ours, leaves in modules
        for their_leaf, leaf, transposed in leaves
    }
    return to_hf, {tensor.name: path for path, tensor in to_hf.items()}


def hf_tensor(path: str, config: DecoderConfig | None = None) -> HFTensor:
    """Find the tensor that holds a parameter.

    Args:
      path: the parameter's logical path.
      config: of the model; by default, one of Llama's names.

    Returns:
      The tensor's name, whether it is transposed, and which of its rows, where it holds more.

    Raises:
      CheckpointError: when the table has no such parameter.

    Example:
      >>> hf_tensor("layers.25.mlp.up_proj.kernel")
      HFTensor(name='model.layers.25.mlp.up_proj.weight', transposed=True, rows=None)
    """
    family = "llama" if config is None else config.family
    key, numbers = template(path)
    to_hf, _ = _tables(family)
    if key not in to_hf:
        raise CheckpointError(f"parameter {path!r} has no Hugging Face name")
    tensor = to_hf[key]
    if config is not None:
        module = key.removeprefix("layers.{i}.").rpartition(".")[0]
        for whole, parts in FAMILIES[family].names.fused.items():
            if module in parts:
                sizes = [_rows(part, config) for part in parts]
                at = parts.index(module)
                name = tensor.name.replace(module, whole)
                tensor = HFTensor(name, tensor.transposed, (sum(sizes[:at]), sizes[at]))
    return tensor._replace(name=numbered(tensor.name, numbers))


def _rows(module: str, config: DecoderConfig) -> int:
    """How many rows the matrix of a projection has, in Hugging Face's layout."""
    heads = {
        "self_attn.q_proj": config.num_attention_heads,
        "self_attn.k_proj": config.num_key_value_heads,
        "self_attn.v_proj": config.num_key_value_heads,
    }.get(module)
    return config.intermediate_size if heads is None else heads * config.head_dim


def logical_path(name: str, family: str = "llama") -> str | None:
    """Find the parameter that a tensor holds: the inverse of `hf_tensor`, but for fused matrices.

    Args:
      name: the tensor's name.
      family: by whose names; see `jaxmoo.models.families.FAMILIES`.

    Returns:
      The parameter's logical path, or None for a tensor the table does not have.

    Example:
      >>> logical_path("model.layers.25.mlp.up_proj.weight")
      'layers.25.mlp.up_proj.kernel'
      >>> logical_path("model.vision.patch_embed.weight") is None
      True
    """
    key, numbers = template(name)
    path = _tables(family)[1].get(key)
    return None if path is None else numbered(path, numbers)


@functools.cache
def templates(family: str) -> tuple[str, ...]:
    """Names of all tensors that files of a family may have, with placeholders for numbers.

    Args:
      family: a key of `jaxmoo.models.families.FAMILIES`.

    Example:
      >>> templates("phi3")[-2:]
      ('model.layers.{i}.self_attn.qkv_proj.weight', 'model.layers.{i}.mlp.gate_up_proj.weight')
    """
    names, to_hf = FAMILIES[family].names, _tables(family)[0]
    prefix = f"{names.prefix}layers.{{i}}."
    parts = tuple(f"layers.{{i}}.{part}." for fused in names.fused.values() for part in fused)
    own = [tensor.name for path, tensor in to_hf.items() if not path.startswith(parts or " ")]
    return (*own, *(f"{prefix}{whole}.weight" for whole in names.fused))


def constant_tensors(config: DecoderConfig) -> dict[str, float]:
    """Names and values of tensors that never change, which a family's files have beside weights."""
    names = FAMILIES[config.family].names
    return {
        f"{names.prefix}layers.{i}.{name}": value
        for i in range(config.num_hidden_layers)
        for name, value in names.constants.items()
    }


_NUMBERS = {
    "{i}": re.compile(r"(?<=layers\.)\d+(?=\.)"),
    "{e}": re.compile(r"(?<=experts\.)\d+(?=\.)"),
}


def template(name: str) -> tuple[str, dict[str, str]]:
    """Replace the layer's and the expert's number by placeholders; return what these stand for.

    Example:
      >>> template("layers.3.mlp.up_proj.kernel")
      ('layers.{i}.mlp.up_proj.kernel', {'{i}': '3'})
    """
    numbers = {}
    for placeholder, number in _NUMBERS.items():
        match = number.search(name)
        if match is not None:
            numbers[placeholder] = match.group()
            name = f"{name[: match.start()]}{placeholder}{name[match.end() :]}"
    return name, numbers


def numbered(name: str, numbers: Mapping[str, str]) -> str:
    """Put numbers back into a name: the inverse of `template`."""
    for placeholder, number in numbers.items():
        name = name.replace(placeholder, number)
    return name
