"""The block table: what enters and leaves the backward pass, a row per block."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["BlockTable", "Diagnostics"]


class Diagnostics(NamedTuple):
    """What is known of blocks that were resolved, float32; N rows, K objectives."""

    gram: jax.Array  # [N, K, K]
    mean_norm: jax.Array  # [N]
    nonfinite: jax.Array  # [N, K]: 1 where an objective was present and not finite
    resolved: jax.Array  # [N]: how often the block was resolved
    update_norm: jax.Array  # [N]
    weights: jax.Array  # [N, K]

    @classmethod
    def zeros(cls, rows: int, objectives: int) -> Diagnostics:
        """Those of blocks that were not resolved."""
        k = objectives
        shapes = {"gram": (k, k), "weights": (k,), "nonfinite": (k,)}
        return cls(*(jnp.zeros((rows, *shapes.get(f, ())), jnp.float32) for f in cls._fields))


class BlockTable(NamedTuple):
    """A row per block, and one to spare; or the rows of one call's blocks."""

    diagnostics: Diagnostics
    states: tuple[Any, ...]  # per group of blocks, the aggregator's state, leaves [N, ...]
