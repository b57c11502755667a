"""The block table: what enters and leaves the backward pass, a row per block."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["BlockTable", "Diagnostics", "no_diagnostics"]


class Diagnostics(NamedTuple):
    """What is known of blocks that were resolved, float32; N rows, K objectives."""

    gram: jax.Array  # [N, K, K]
    gram_error: jax.Array  # [N]: estimated relative error; 0 where Gram matrices are exact
    mean_norm: jax.Array  # [N]
    nonfinite: jax.Array  # [N, K]: 1 where an objective was present and not finite
    resolved: jax.Array  # [N]: how often the block was resolved
    update_norm: jax.Array  # [N]
    weights: jax.Array  # [N, K]

    def packed(self) -> jax.Array:
        """One array [N, columns]: a row is written at once."""
        rows = len(self.gram)
        return jnp.concatenate([x.reshape(rows, -1).astype(jnp.float32) for x in self], axis=1)

    @classmethod
    def of(cls, packed: jax.Array, objectives: int) -> Diagnostics:
        """Take apart what :meth:`packed` made, without the row to spare."""
        shapes = _shapes(objectives)
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        columns = jnp.split(packed[:-1], ends[:-1], axis=1)
        return cls(*(x.reshape(-1, *shape) for x, shape in zip(columns, shapes, strict=True)))


def _shapes(objectives: int) -> list[tuple[int, ...]]:
    """Shapes of a block's diagnostics."""
    k = objectives
    shapes = {"gram": (k, k), "weights": (k,), "nonfinite": (k,)}
    return [shapes.get(name, ()) for name in Diagnostics._fields]


class BlockTable(NamedTuple):
    """A row per block, and one to spare; or the rows of one call's blocks."""

    diagnostics: jax.Array  # float32 [N, columns], see Diagnostics.packed
    states: tuple[Any, ...]  # per group of blocks, the aggregator's state, leaves [N, ...]


def no_diagnostics(rows: int, objectives: int) -> jax.Array:
    """Those of blocks that were not resolved, packed."""
    return jnp.zeros((rows, sum(math.prod(shape) for shape in _shapes(objectives))), jnp.float32)
