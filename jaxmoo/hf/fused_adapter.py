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

__all__ = ["below", "blocks", "fuse_adapters", "plain", "together"]


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
        rank, alpha, ratios = together(
            [adapted[_last(part)] for part in mine], settings["use_rslora"]
        )
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
            heights = {part: x[1] for part, x in zip(parts, rows, strict=True) if x is not None}
            for kind, tensor in (("A", below(a)), ("B", blocks(b, mine, heights, ratios))):
                name = f"{start}.{whole}.lora_{kind}.weight"
                found[name] = tensor._replace(name=name)
    return settings, list(found.values())


def plain(alpha: float) -> float:
    """A whole number without a point, as PEFT's users write it."""
    return int(alpha) if alpha == int(alpha) else alpha


def together(linears: Sequence[AdaptedLinear], rslora: bool) -> tuple[int, float, Sequence[float]]:
    """Rank and alpha of one adapter in the place of several.

    All are scaled like the first; what another's scale is beyond that goes into its B.

    Args:
      linears: the adapted projections.
      rslora: whether scales are by the root of the rank.

    Returns:
      Rank, alpha, and by what the B of each is to be multiplied.
    """
    rank, scale = sum(linear.rank for linear in linears), linears[0].scale
    alpha = plain(round(scale * (rank**0.5 if rslora else rank), 9))
    return rank, alpha, [linear.scale / scale for linear in linears]


def below(parts: Sequence[Tensor]) -> Tensor:
    """Matrices [n, in], one below the other."""
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    return Tensor(
        "", shape, parts[0].dtype, lambda: np.concatenate([part.read() for part in parts])
    )


def blocks(
    parts: Sequence[Tensor],
    mine: Sequence[str],
    heights: Mapping[str, int],
    ratios: Sequence[float],
) -> Tensor:
    """Matrices [out, r] in the rows and columns that are their own.

    Args:
      parts: the matrices.
      mine: of which projection each is.
      heights: of all projections in the whole, in their order.
      ratios: by what each matrix is multiplied.
    """
    shape = (sum(heights.values()), sum(part.shape[1] for part in parts))
    ends = dict(zip(heights, np.cumsum(list(heights.values())).tolist(), strict=True))

    def read() -> np.ndarray:
        whole, column = np.zeros(shape, parts[0].dtype), 0
        for part, name, ratio in zip(parts, mine, ratios, strict=True):
            width = part.shape[1]
            value = part.read()
            if ratio != 1:
                value = value * np.asarray(ratio, value.dtype)
            whole[ends[name] - heights[name] : ends[name], column : column + width] = value
            column += width
        return whole

    return Tensor("", shape, parts[0].dtype, read)


def _last(module: str) -> str:
    return module.rpartition(".")[2]
