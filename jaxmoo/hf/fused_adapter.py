"""Adapters of projections that a family's files keep in one matrix, as one adapter of that matrix.

The matrix of q, k and v, one below the other, gets an adapter of their ranks together: the A of all
three, one below the other, and the B of each in the rows and columns that are its own, else 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoo.errors import CheckpointError
from jaxmoo.hf.names import hf_tensor
from jaxmoo.hf.save import Tensor
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.families import FAMILIES
from jaxmoo.models.lora import AdaptedLinear

__all__ = ["fuse_adapters"]


def fuse_adapters(
    settings: Mapping[str, Any],
    tensors: Sequence[Tensor],
    adapted: Mapping[str, AdaptedLinear],
    config: DecoderConfig,
) -> tuple[dict[str, Any], list[Tensor]]:
    """Rewrite adapters in PEFT format for the matrices that a family has.

    Args:
      settings: contents of ``adapter_config.json``.
      tensors: of the adapters.
      adapted: the adapted projections, by name.
      config: of the model.

    Returns:
      Both anew; the same where the family keeps every projection by itself.

    Raises:
      CheckpointError: the adapters are weight-decomposed (DoRA).
    """
    settings, found = dict(settings), {tensor.name: tensor for tensor in tensors}
    for whole, parts in FAMILIES[config.family].names.fused.items():
        mine = [part for part in parts if _last(part) in adapted]
        if not mine:
            continue
        if settings["use_dora"]:
            raise CheckpointError(
                f"weight-decomposed adapters (DoRA) of {_last(whole)}, which {config.family} "
                "keeps in one matrix, cannot be written as adapters. Merge them instead."
            )
        linears = [adapted[_last(part)] for part in mine]
        rank = sum(linear.rank for linear in linears)
        # All scaled like the first; what another's scale is beyond that goes into its B.
        scale = linears[0].scale
        alpha = round(scale * (rank**0.5 if settings["use_rslora"] else rank), 9)
        for name, value in (("rank_pattern", rank), ("alpha_pattern", alpha)):
            kept = {k: v for k, v in settings[name].items() if k not in map(_last, mine)}
            settings[name] = {**kept, _last(whole): value}
        targets = {*settings["target_modules"], _last(whole)} - {_last(part) for part in mine}
        settings["target_modules"] = sorted(targets)
        ends = f".{mine[0]}.lora_A.weight"
        for start in [name.removesuffix(ends) for name in found if name.endswith(ends)]:
            a, b = (
                [found.pop(f"{start}.{part}.lora_{kind}.weight") for part in mine] for kind in "AB"
            )
            rows = [hf_tensor(f"layers.0.{part}.kernel", config).rows for part in parts]
            height = max(sum(x) for x in rows if x is not None)
            places = [rows[parts.index(part)] for part in mine]
            ratios = [linear.scale / scale for linear in linears]
            for kind, tensor in (("A", _below(a)), ("B", _blocks(b, places, ratios, height))):
                name = f"{start}.{whole}.lora_{kind}.weight"
                found[name] = tensor._replace(name=name)
    return settings, list(found.values())


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _below(parts: Sequence[Tensor]) -> Tensor:
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    return Tensor(
        "", shape, parts[0].dtype, lambda: np.concatenate([part.read() for part in parts])
    )


def _blocks(
    parts: Sequence[Tensor], places: Sequence[Any], ratios: Sequence[float], height: int
) -> Tensor:
    shape = (height, sum(part.shape[1] for part in parts))

    def read() -> np.ndarray:
        whole, column = np.zeros(shape, parts[0].dtype), 0
        for part, (first, count), ratio in zip(parts, places, ratios, strict=True):
            width = part.shape[1]
            value = part.read()
            if ratio != 1:
                value = value * np.asarray(ratio, value.dtype)
            whole[first : first + count, column : column + width] = value
            column += width
        return whole

    return Tensor("", shape, parts[0].dtype, read)
