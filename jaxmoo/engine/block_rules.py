"""How blocks are resolved: the same for all of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from jaxmoo.block_solve import Group

__all__ = ["BlockRules"]


@dataclasses.dataclass(frozen=True, eq=False)
class BlockRules:
    """What decides how blocks are resolved.

    Attributes:
      groups: blocks by aggregator; None for the plain sum of gradients.
      num_blocks: B.
      preference: weights of the objectives [K], or None.
      match_norm: see :func:`jaxmoo.resolve_conflicts`.
      replicas: how the gradients of replicas are joined; see ``resolved_value_and_grad``.
      sketch: entries of the sketches that Gram matrices are estimated from; None: they are exact.
      keep: what exists of a call's gradients at one time; see ``resolved_value_and_grad``.
      sparse: per block, whether objectives whose gradient is zero in it are absent.
    """

    groups: Sequence[Group] | None
    num_blocks: int
    preference: np.ndarray | None
    match_norm: bool
    replicas: str
    sketch: int | None = None
    keep: str = "gradients"
    sparse: Sequence[bool] = ()

    @functools.cached_property
    def group_of(self) -> np.ndarray:
        """The group of each block, int [B + 1]; -1 for the spare row."""
        found = np.full(self.num_blocks + 1, -1)
        for number, group in enumerate(self.groups or ()):
            found[np.asarray(group.blocks)] = number
        return found
