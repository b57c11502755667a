"""Adapters of experts in PEFT's format: one of a whole layer's stacked matrices.

In transformers 5 a layer's experts are two arrays, ``mlp.experts.gate_up_proj`` [E, 2 F, D] and
``mlp.experts.down_proj`` [E, D, F], which PEFT adapts as ``target_parameters``. Of an adapter of
rank r, A is [E r, in], one expert's rows below the other's, and B [out, r E], where the columns of
an expert lie E apart. PEFT wraps the second array's adapter around the first's, whose tensors
therefore have a ``base_layer`` in their names, if both are adapted.

The adapter of gate_up_proj is that of a fused matrix: ours of gate and up, with an A each, become
one whose rank is theirs together. PEFT does the same with adapters from transformers 4, where each
projection of each expert was a linear map. Such files are read, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoo.errors import CheckpointError
from jaxmoo.hf.adapter_names import GATE_UP, STACKS, START, Place, place_of
from jaxmoo.hf.fused_adapter import below, blocks, together
from jaxmoo.hf.save import Tensor
from jaxmoo.models.lora import AdaptedLinear

__all__ = ["Columns", "columns_of", "single_tensors", "stack_experts"]

_OF_AN_MLP = [part for parts in STACKS.values() for part in parts]


def stack_experts(
    settings: Mapping[str, Any], tensors: Sequence[Tensor], adapted: Mapping[str, AdaptedLinear]
) -> tuple[dict[str, Any], list[Tensor]]:
    """Rewrite adapters of single experts for the arrays that transformers has.

    Args:
      settings: contents of ``adapter_config.json``.
      tensors: of the adapters, those of experts one by one, A [r, in] and B [out, r], in the order
        of the experts' numbers.
      adapted: the adapted projections, by name.

    Returns:
      Both anew; the same where no experts are adapted.
    """
    found = {tensor.name: tensor for tensor in tensors}
    modules: dict[tuple[int, str, str], list[Tensor]] = {}  # of all experts, in their order
    for name in list(found):
        place = place_of(name, settings)
        if place is not None and place.is_single:
            key = (place.layer, place.projection, place.kind)
            modules.setdefault(key, []).append(found.pop(name))
    if not modules:
        return dict(settings), list(tensors)
    stacks = {stack: [x for x in parts if x in adapted] for stack, parts in STACKS.items()}
    stacks = {stack: mine for stack, mine in stacks.items() if mine}
    layers = sorted({layer for layer, *_ in modules})
    scales: dict[str, tuple[int, float]] = {}
    for depth, (stack, mine) in enumerate(reversed(stacks.items())):
        rank, alpha, ratios = together([adapted[part] for part in mine], settings["use_rslora"])
        scales[stack] = rank, alpha
        for layer in layers:
            a, b = (zip(*(modules[layer, x, kind] for x in mine), strict=True) for kind in "AB")
            heights = {part: modules[layer, mine[0], "B"][0].shape[0] for part in STACKS[stack]}
            whole = {
                "A": below([below(parts) for parts in a]),
                "B": _interleaved([blocks(parts, mine, heights, ratios) for parts in b]),
            }
            for kind, tensor in whole.items():
                module = f"layers.{layer}.mlp.experts{'.base_layer' * depth}"
                name = f"{START}{module}.lora_{kind}.weight"
                found[name] = tensor._replace(name=name)
    return _of_stacks(settings, scales, layers), list(found.values())


def _of_stacks(
    settings: Mapping[str, Any], scales: Mapping[str, tuple[int, float]], layers: Sequence[int]
) -> dict[str, Any]:
    """The settings with stacks, of these ranks and alphas, in place of an MLP's projections."""
    result = dict(settings)
    patterns = (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    for at, (pattern, general) in enumerate(patterns):
        others = {key: x for key, x in settings[pattern].items() if key not in _OF_AN_MLP}
        own = {stack: scale[at] for stack, scale in scales.items()}
        result[pattern] = others | {k: x for k, x in own.items() if x != settings[general]}
    targets = [x for x in settings["target_modules"] if x not in _OF_AN_MLP]
    # PEFT goes by layers_to_transform for modules alone.
    everywhere = settings["layers_to_transform"] is None
    starts = [""] if everywhere else [f"layers.{layer}." for layer in layers]
    parameters = sorted(f"{start}mlp.experts.{stack}" for start in starts for stack in scales)
    result |= {"target_modules": targets, "target_parameters": parameters}
    if not targets:
        result |= {"layers_to_transform": None, "layers_pattern": None}
    return result


def _interleaved(parts: Sequence[Tensor]) -> Tensor:
    """The B of all experts, [out, r E]."""
    out, rank = parts[0].shape

    def read() -> np.ndarray:
        return np.stack([part.read() for part in parts], -1).reshape(out, -1)

    return Tensor("", (out, rank * len(parts)), parts[0].dtype, read)


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
    return {name: own for name, own in zip(STACKS[GATE_UP], used, strict=True) if own.any()}


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
    wholes = STACKS[place.projection]
    for projection, chosen in parts.items():
        for expert, own in enumerate(each):
            if place.kind == "A":
                part = own[chosen]
            else:
                part = np.split(own, len(wholes))[wholes.index(projection)][:, chosen]
            yield place.tensor(projection, expert), part


def _check_stack(name: str, value: np.ndarray, axis: int, rank: int) -> None:
    if value.ndim != 2 or not value.size or value.shape[axis] % rank:
        raise CheckpointError(
            f"{name}: expected a matrix whose axis {axis} is a multiple of {rank}, every expert's "
            f"rank; found shape {list(value.shape)}"
        )
