"""Conflict between the languages' gradients, from their inner products.

Everything here is read off Gram matrices: entry i, j of a block's Gram matrix is the inner product
of the gradients of languages i and j in that block. Those of disjoint blocks add up to that of
the blocks together, so records of modules also tell of layers and of the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

__all__ = [
    "conflict_share",
    "cosines",
    "layer_of",
    "magnitude_ratio",
    "mean_cosine",
    "module_of",
    "together",
]


def cosines(grams: np.ndarray) -> np.ndarray:
    """Cosines between gradients; nan where a language has none.

    Args:
      grams: Gram matrices [..., K, K].

    Example:
      >>> cosines(np.array([[4.0, -1.0], [-1.0, 1.0]])).tolist()
      [[1.0, -0.5], [-0.5, 1.0]]
    """
    grams = np.asarray(grams, np.float64)
    squares = np.diagonal(grams, axis1=-2, axis2=-1)
    norms = np.sqrt(np.where(squares > 0, squares, np.nan))
    return np.clip(grams / (norms[..., :, None] * norms[..., None, :]), -1, 1)


def conflict_share(grams: np.ndarray) -> np.ndarray:
    """Share of pairs of languages with a negative inner product; nan with fewer than two.

    Args:
      grams: [..., K, K].

    Example:
      >>> float(conflict_share(np.array([[4.0, -1.0], [-1.0, 1.0]])))
      1.0
    """
    cosine = _pairs(cosines(grams))
    known = np.isfinite(cosine).sum(-1)
    return np.where(known > 0, (cosine < 0).sum(-1) / np.maximum(known, 1), np.nan)


def mean_cosine(grams: np.ndarray) -> np.ndarray:
    """Mean cosine of the pairs of languages; nan with fewer than two.

    Args:
      grams: [..., K, K].

    Example:
      >>> float(mean_cosine(np.array([[4.0, -1.0], [-1.0, 1.0]])))
      -0.5
    """
    cosine = _pairs(cosines(grams))
    known = np.isfinite(cosine).sum(-1)
    return np.where(known > 0, np.nansum(cosine, -1) / np.maximum(known, 1), np.nan)


def magnitude_ratio(grams: np.ndarray) -> np.ndarray:
    """Norm of the longest gradient over that of the shortest; nan with fewer than two.

    Args:
      grams: [..., K, K].

    Example:
      >>> float(magnitude_ratio(np.array([[4.0, -1.0], [-1.0, 1.0]])))
      2.0
    """
    squares = np.diagonal(np.asarray(grams, np.float64), axis1=-2, axis2=-1)
    present = squares > 0
    longest = np.where(present, squares, 0).max(-1)
    shortest = np.where(present, squares, np.inf).min(-1)
    enough = present.sum(-1) > 1
    return np.where(enough, np.sqrt(longest / np.where(enough, shortest, 1)), np.nan)


def _pairs(matrices: np.ndarray) -> np.ndarray:
    rows, columns = np.triu_indices(matrices.shape[-1], 1)
    return matrices[..., rows, columns]


def layer_of(block: str) -> str | None:
    """The layer that a block is, or is part of; None for blocks that are no part of a layer.

    Example:
      >>> layer_of("layers.3.self_attn"), layer_of("layers.3"), layer_of("norm")
      ('layers.3', 'layers.3', None)
    """
    match = re.match(r"layers\.\d+(?=\.|$)", block)
    return match[0] if match else None


def module_of(block: str) -> str | None:
    """The module of a layer that a block is; None for anything else.

    Example:
      >>> module_of("layers.3.self_attn"), module_of("layers.3"), module_of("norm")
      ('self_attn', None, None)
    """
    match = re.match(r"layers\.\d+\.([^.]+)", block)
    return match[1] if match else None


def together(
    grams: np.ndarray, blocks: Sequence[str], names: Sequence[str | None]
) -> tuple[list[str], np.ndarray]:
    """Gram matrices of larger blocks, which smaller ones make up.

    Args:
      grams: [..., B, K, K].
      blocks: names of the blocks [B].
      names: per block, the larger one to which it belongs; None leaves it out.

    Returns:
      The names of the larger blocks, in the order of their first parts, and their Gram matrices.

    Example:
      >>> grams = np.array([[[1.0]], [[2.0]], [[4.0]]])
      >>> blocks = ["layers.0.mlp", "layers.0.self_attn", "norm"]
      >>> names, sums = together(grams, blocks, [layer_of(b) for b in blocks])
      >>> names, sums.tolist()
      (['layers.0'], [[[3.0]]])
    """
    if len(blocks) != len(names):
        raise ValueError(f"{len(blocks)} blocks, but {len(names)} names")
    larger = list(dict.fromkeys(name for name in names if name is not None))
    sums = [
        grams[..., [i for i, name in enumerate(names) if name == whole], :, :].sum(-3)
        for whole in larger
    ]
    shape = (*grams.shape[:-3], 0, *grams.shape[-2:])
    return larger, np.stack(sums, axis=-3) if sums else np.zeros(shape)
