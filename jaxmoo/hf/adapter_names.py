"""Names of adapters' tensors in the directories of Hugging Face's PEFT library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxmoo.hf.names import HFTensor, hf_tensor, logical_path

__all__ = ["GATE_UP", "STACKS", "START", "Place", "peft_tensor", "place_of"]

GATE_UP = "gate_up_proj"

# Arrays of a layer's experts in transformers 5, in their order, and the projections that they hold.
STACKS = {GATE_UP: ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

START = "base_model.model.model."

_TENSOR = re.compile(
    rf"{re.escape(START)}layers\.([0-9]{{1,6}})\.([\w.]+)\.lora_(A|B|magnitude_vector)(\.weight)?"
)
_STACK = re.compile(r"mlp\.experts((?:\.base_layer)*)")
_SINGLE = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.([0-9]{1,6})\.\w+")


def peft_tensor(path: str) -> HFTensor:
    """Find the tensor that holds an adapter, by the adapter's logical path.

    Example:
      >>> peft_tensor("layers.25.mlp.up_proj.lora_A.kernel")
      HFTensor(name='base_model.model.model.layers.25.mlp.up_proj.lora_A.weight', transposed=True,
               rows=None)
    """
    projection, _, rest = path.partition(".lora_")
    adapted = hf_tensor(f"{projection}.kernel")
    module, weight = adapted.name.rsplit(".", 1)
    name = f"base_model.model.{module}.lora_"
    if rest == "magnitude_vector":
        return adapted._replace(name=f"{name}{rest}", transposed=False)
    return adapted._replace(name=f"{name}{rest.removesuffix('.kernel')}.{weight}")


class Place(NamedTuple):
    """What a tensor of a directory of adapters belongs to.

    Attributes:
      layer: number of the layer.
      module: the projection's name within the layer by our names, such as ``self_attn.q_proj`` or
        ``mlp.experts.3.up_proj``; or that of a stack, such as ``mlp.experts.gate_up_proj``.
      kind: ``A``, ``B`` or ``magnitude_vector``.
      key: by which name PEFT looks the module up in its patterns.
    """

    layer: int
    module: str
    kind: str
    key: str

    @property
    def projection(self) -> str:
        """The projection's name, or ``gate_up_proj``."""
        return self.module.rpartition(".")[2]

    @property
    def is_stack(self) -> bool:
        """Whether the tensor is that of all of a layer's experts."""
        return self.module.rpartition(".")[0] == "mlp.experts"

    @property
    def is_single(self) -> bool:
        """Whether the tensor is that of one expert."""
        return _SINGLE.fullmatch(self.module) is not None

    def tensor(self, projection: str | None = None, expert: int | None = None) -> str:
        """Name that its tensor, or an expert's part of it, has by our names."""
        module = self.module
        if projection is not None:
            module = f"mlp.experts.{expert}.{projection}"
        end = "" if self.kind == "magnitude_vector" else ".weight"
        return f"{START}layers.{self.layer}.{module}.lora_{self.kind}{end}"


def place_of(name: str, settings: Mapping[str, Any]) -> Place | None:
    """Tell what a tensor belongs to; None if it is no adapter on something in a layer.

    Args:
      name: the tensor's name.
      settings: contents of ``adapter_config.json``.

    Example:
      >>> place_of(
      ...     "base_model.model.model.layers.3.mlp.experts.base_layer.lora_A.weight",
      ...     {"target_parameters": ["experts.down_proj", "experts.gate_up_proj"]})
      Place(layer=3, module='mlp.experts.gate_up_proj', kind='A',
            key='model.layers.3.mlp.experts.gate_up_proj')
    """
    match = _TENSOR.fullmatch(name)
    if match is None or (match[3] == "magnitude_vector") == bool(match[4]):
        return None
    layer, module, kind = int(match[1]), match[2], match[3]
    key = f"model.layers.{layer}.{module}"
    given = [str(x) for x in settings.get("target_parameters") or []]

    def is_target(parameter: str) -> bool:
        return any(f".{parameter}".endswith(f".{target}") for target in given)

    if stack := _STACK.fullmatch(module):
        start = f"model.layers.{layer}.mlp.experts"
        # The last one is wrapped around those before.
        wholes = [whole for whole in reversed(STACKS) if is_target(f"{start}.{whole}")]
        depth = stack[1].count(".")
        if depth >= len(wholes):
            return None
        return Place(layer, f"mlp.experts.{wholes[depth]}", kind, f"{start}.{wholes[depth]}")
    if is_target(f"{key}.weight"):
        key = f"{key}.weight"
    if _SINGLE.fullmatch(module):
        family = "mixtral" if module.startswith("block") else "llama"
        path = logical_path(f"model.layers.{layer}.{module}.weight", family)
        if path is None:
            return None
        return Place(layer, path.split(".", 2)[2].removesuffix(".kernel"), kind, key)
    return Place(layer, module, kind, key) if module.count(".") == 1 else None
