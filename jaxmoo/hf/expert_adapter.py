"""Adapters of experts in PEFT's format: one of a whole layer's stacked matrices.

In transformers 5 a layer's experts are two arrays, ``mlp.experts.gate_up_proj`` [E, 2 F, D] and
``mlp.experts.down_proj`` [E, D, F], which PEFT adapts as ``target_parameters``. Of an adapter of
rank r, A is [E r, in], one expert's rows below the other's, and B [out, r E], where the columns of
an expert lie E apart. PEFT wraps the second array's adapter around the first's, whose tensors
therefore have a ``base_layer`` in their names, if both are adapted.

The adapter of gate_up_proj is that of a fused matrix: ours of gate and up, with an A each, become
one whose rank is theirs together. PEFT makes the same of adapters from transformers 4, where each
projection of each expert was a linear map. Such files are read, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmoo.errors import CheckpointError
from jaxmoo.hf.fused_adapter import below, blocks, together
from jaxmoo.hf.names import logical_path
from jaxmoo.hf.save import Tensor
from jaxmoo.models.lora import AdaptedLinear

__all__ = [
    "GATE_UP",
    "Columns",
    "Place",
    "columns_of",
    "place_of",
    "single_tensors",
    "stack_experts",
]

GATE_UP = "gate_up_proj"

# Arrays of a layer's experts, in their order, and the projections that they hold.
_WHOLES = {GATE_UP: ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_OF_AN_MLP = [part for parts in _WHOLES.values() for part in parts]

_START = "base_model.model.model."
_TENSOR = re.compile(
    r"base_model\.model\.model\.layers\.([0-9]{1,6})\.([\w.]+)\.lora_(A|B|magnitude_vector)(\.weight)?"
)
_STACK = re.compile(r"mlp\.experts((?:\.base_layer)*)")
_SINGLE = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.([0-9]{1,6})\.\w+")


def stack_experts(
    settings: Mapping[str, Any], tensors: Sequence[Tensor], adapted: Mapping[str, AdaptedLinear]
) -> tuple[dict[str, Any], list[Tensor]]:
    """Rewrite adapters of single experts for the arrays that transformers has.

    Args:
      settings: contents of ``adapter_config.json``.
      tensors: of the adapters, those of experts one by one.
      adapted: the adapted projections, by name.

    Returns:
      Both anew; the same where no experts are adapted.
    """
    settings, found = dict(settings), {tensor.name: tensor for tensor in tensors}
    modules: dict[tuple[int, str, str], list[Tensor]] = {}  # of all experts, in their order
    for name in list(found):
        layer, module, kind = _parts(name)
        if _SINGLE.fullmatch(module):
            projection = module.rpartition(".")[2]
            modules.setdefault((layer, projection, kind), []).append(found.pop(name))
    if not modules:
        return settings, list(tensors)
    wholes = {whole: [x for x in parts if x in adapted] for whole, parts in _WHOLES.items()}
    wholes = {whole: mine for whole, mine in wholes.items() if mine}
    ranks, alphas, targets = {}, {}, []
    for depth, (whole, mine) in enumerate(reversed(wholes.items())):
        ranks[whole], alphas[whole], ratios = together(
            [adapted[part] for part in mine], settings["use_rslora"]
        )
        for layer in sorted({layer for layer, *_ in modules}):
            a, b = (zip(*(modules[layer, x, kind] for x in mine), strict=True) for kind in "AB")
            heights = {part: modules[layer, mine[0], "B"][0].shape[0] for part in _WHOLES[whole]}
            start = f"{_START}layers.{layer}.mlp.experts{'.base_layer' * depth}"
            stack = below([below(parts) for parts in a])
            found[f"{start}.lora_A.weight"] = stack._replace(name=f"{start}.lora_A.weight")
            stack = _interleaved([blocks(parts, mine, heights, ratios) for parts in b])
            found[f"{start}.lora_B.weight"] = stack._replace(name=f"{start}.lora_B.weight")
            targets.append((layer, f"mlp.experts.{whole}"))
    for name, general, own in (
        ("rank_pattern", "r", ranks),
        ("alpha_pattern", "lora_alpha", alphas),
    ):
        others = {key: x for key, x in settings[name].items() if key not in _OF_AN_MLP}
        settings[name] = others | {k: x for k, x in own.items() if x != settings[general]}
    settings["target_modules"] = [x for x in settings["target_modules"] if x not in _OF_AN_MLP]
    everywhere = settings["layers_to_transform"] is None
    settings["target_parameters"] = sorted(
        {name if everywhere else f"layers.{layer}.{name}" for layer, name in targets}
    )
    if not settings["target_modules"]:
        settings |= {"layers_to_transform": None, "layers_pattern": None}
    return settings, list(found.values())


def _parts(name: str) -> tuple[int, str, str]:
    """Layer, module and kind of a tensor that is an adapter's."""
    match = _TENSOR.fullmatch(name)
    assert match is not None, name
    return int(match[1]), match[2], match[3]


def _interleaved(parts: Sequence[Tensor]) -> Tensor:
    """The B of all experts, [out, r E]."""
    out, rank = parts[0].shape

    def read() -> np.ndarray:
        return np.stack([part.read() for part in parts], -1).reshape(out, -1)

    return Tensor("", (out, rank * len(parts)), parts[0].dtype, read)


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
    def stacked(self) -> bool:
        """Whether the tensor is that of all of a layer's experts."""
        return self.module.rpartition(".")[0] == "mlp.experts"

    def tensor(self, projection: str | None = None, expert: int | None = None) -> str:
        """Name that its tensor, or an expert's part of it, has by our names."""
        module = self.module
        if projection is not None:
            module = f"mlp.experts.{expert}.{projection}"
        end = "" if self.kind == "magnitude_vector" else ".weight"
        return f"{_START}layers.{self.layer}.{module}.lora_{self.kind}{end}"


def place_of(name: str, settings: Mapping[str, Any]) -> Place | None:
    """Tell what a tensor belongs to; None if it is no adapter on something in a layer.

    Args:
      name: the tensor's name.
      settings: contents of ``adapter_config.json``.
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
        wholes = [whole for whole in reversed(_WHOLES) if is_target(f"{start}.{whole}")]
        depth = stack[1].count(".")
        if depth >= len(wholes):
            return None
        return Place(layer, f"mlp.experts.{wholes[depth]}", kind, f"{start}.{wholes[depth]}")
    if _SINGLE.fullmatch(module):
        family = "mixtral" if module.startswith("block") else "llama"
        path = logical_path(f"model.layers.{layer}.{module}.weight", family)
        if path is None:
            return None
        return Place(layer, path.split(".", 2)[2].removesuffix(".kernel"), kind, key)
    if module.count(".") != 1:
        return None
    return Place(layer, module, kind, f"{key}.weight" if is_target(f"{key}.weight") else key)


# Which columns of B, and rows of A, the projections in a stack of experts have; bool [r] each.
Columns = Mapping[str, np.ndarray]


def columns_of(stacks: Iterable[tuple[str, np.ndarray]], rank: int) -> Columns:
    """Find which of the two projections in gate_up_proj uses which columns of its B.

    Args:
      stacks: names and values of all layers' B, [2 F, r E].
      rank: r.

    Returns:
      For each projection that uses any, which; for both all of them where none is used, as in
      adapters that have not been trained.

    Raises:
      CheckpointError: a shape does not fit.
    """
    used = np.zeros((2, rank), bool)
    for name, b in stacks:
        _check_stack(name, b, 1, rank)
        if b.shape[0] % 2:
            raise CheckpointError(f"{name}: expected an even number of rows, found {b.shape[0]}")
        used |= (b.reshape(2, -1, rank, b.shape[1] // rank) != 0).any((1, 3))
    if not used.any():
        used[:] = True
    return {name: own for name, own in zip(_WHOLES[GATE_UP], used, strict=True) if own.any()}


def single_tensors(
    name: str, value: np.ndarray, place: Place, rank: int, columns: Columns
) -> Iterator[tuple[str, np.ndarray]]:
    """Take the adapters of single experts from those of a stack.

    Args:
      name: the stack's name, for errors.
      value: A or B of all experts.
      place: what it belongs to.
      rank: of one expert.
      columns: of the projections in gate_up_proj.

    Yields:
      The tensors, [r, in] or [out, r], by our names.

    Raises:
      CheckpointError: the shape does not fit.
    """
    axis = int(place.kind == "B")
    _check_stack(name, value, axis, rank)
    count = value.shape[axis] // rank
    if place.kind == "A":
        each = value.reshape(count, rank, -1)
    else:
        each = np.moveaxis(value.reshape(-1, rank, count), -1, 0)
    parts: Columns = (
        columns if place.projection == GATE_UP else {place.projection: np.ones(rank, bool)}
    )
    wholes = _WHOLES[place.projection]
    for projection, chosen in parts.items():
        for expert, own in enumerate(each):
            if place.kind == "A":
                part = own[chosen]
            else:
                part = np.split(own, len(wholes))[wholes.index(projection)][:, chosen]
            yield place.tensor(projection, expert), part


def _check_stack(name: str, value: np.ndarray, axis: int, rank: int) -> None:
    if value.ndim != 2 or value.shape[axis] % rank:
        raise CheckpointError(
            f"{name}: expected a matrix with a multiple of {rank}, its rank, on axis {axis}, for "
            f"every expert the same; found shape {list(value.shape)}"
        )
