"""From the Gram matrices of blocks to the objectives' weights, and what is known of the update.

Nothing here reads a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoo.aggregators import Aggregator
from jaxmoo.aggregators.solved import Solved, solve_block, unsolved
from jaxmoo.kernels.launch import solving_on

__all__ = ["Grams", "Group", "Resolution", "in_own_units", "solve_blocks"]


class Grams(NamedTuple):
    """Inner products of B blocks' gradients."""

    gram: jax.Array  # float32 or float64 [B, K, K]
    unit: jax.Array  # [B]: what gradients have been multiplied by where they meet each other
    error: jax.Array  # [B]: estimated relative error of gram; 0 where it is exact

    @property
    def present(self) -> jax.Array:
        """Which objectives have a gradient that is not zero everywhere, bool [K]."""
        return self._nonzero.any(0)

    @property
    def _nonzero(self) -> jax.Array:
        return jnp.diagonal(self.gram, axis1=1, axis2=2) != 0

    def taking_part(self, active: jax.Array, sparse: Any) -> jax.Array:
        """Which of the present objectives have a part in each block.

        Args:
          active: bool [K], the objectives that are present.
          sparse: bool [B], blocks in which a gradient of zero means absence; None: there are none.

        Returns:
          bool [B, K]; or `active`, where it is the same for all blocks.
        """
        if sparse is None:
            return active
        return active & (self._nonzero | ~jnp.asarray(sparse)[:, None])


class Group(NamedTuple):
    """Blocks that share an aggregator, and so are solved as one batch."""

    aggregator: Aggregator
    blocks: Sequence[int] | np.ndarray  # which of the blocks at hand are solved with it
    member: jax.Array | None = None  # bool, one per entry of blocks; None: all are members


class Resolution(NamedTuple):
    """What :func:`resolve` returns. B blocks, K objectives."""

    updates: list[jax.Array]  # one array per input array, without the objective axis
    state: tuple[Any, ...]  # new aggregator state, one pytree per group
    # float32 or float64 [B, K, K]; rows of objectives left out are zero; infinite or 0 where a
    # product leaves that type's range
    gram: jax.Array
    weights: jax.Array  # [B, K], of gram's type; zero in blocks resolved coordinate by coordinate
    update_norm: jax.Array  # [B]
    mean_norm: jax.Array  # [B]
    nonfinite: jax.Array  # bool [B, K]: present, but non-finite in this block
    gram_error: jax.Array  # [B]: estimated relative error of gram; 0 where it is exact


def solve_blocks(
    grams: Grams,
    groups: Sequence[Group],
    numbers: jax.Array,
    *,
    crossed: jax.Array | None = None,
    state: Sequence[Any],
    key: jax.Array,
    active: jax.Array,
    preference: jax.Array | None,
    match_norm: bool,
    platform: str | None = None,
) -> Resolution:
    """Weigh the objectives of B blocks.

    Args:
      grams: the blocks' Gram matrices.
      groups: aggregator of every block; ``blocks`` index into the B blocks.
      numbers: int [B], the number from which each block's key is made.
      crossed: products with the gradients of a second batch [B, K, K], for aggregators that need
        one.
      state: see :func:`jaxmoo.resolve.resolve`.
      key: likewise.
      active: bool [K], the objectives that are present; or [B, K], in each block.
      preference: likewise.
      match_norm: likewise.
      platform: on a GPU or a TPU a solve is one kernel; see :mod:`jaxmoo.platforms`.

    Returns:
      The :class:`Resolution` without updates, of gradients multiplied by the unit.
    """
    gram, unit = grams.gram, grams.unit
    products: Mapping[bool, Any] = {False: gram, True: crossed}
    solved = unsolved(len(gram), active.shape[-1], gram.dtype)
    power = jnp.ones_like(unit)  # by which weights depend on what gradients were multiplied by
    new_state = []
    for group, group_state in zip(groups, state, strict=True):
        method, mine = group.aggregator, np.asarray(group.blocks)
        solve = jax.vmap(
            functools.partial(
                solve_block,
                method,
                active=active,
                preference=preference,
                key=key,
                match_norm=match_norm,
            )
        )
        # Instead of that of all blocks.
        of_each: dict[str, Any] = {"active": active[mine]} if active.ndim == 2 else {}
        with solving_on(platform):
            found, group_state = solve(
                gram[mine], products[method.cross_gram][mine], group_state, numbers[mine], **of_each
            )
        solved = _put(solved, found, group)
        if not method.unit_scale:
            power = power.at[mine].set(unit[mine] ** (-2 * method.gram_degree))
        new_state.append(group_state)
    weights, update_norm = solved.weights, solved.update_norm
    if not match_norm:
        weights, update_norm = weights * power[:, None], update_norm * power
    return Resolution(
        updates=[],
        state=tuple(new_state),
        gram=solved.gram,
        weights=weights,
        update_norm=update_norm,
        mean_norm=solved.mean_norm,
        nonfinite=solved.nonfinite,
        gram_error=grams.error,
    )


def in_own_units(found: Resolution, unit: jax.Array) -> Resolution:
    """Undo the unit [B] that gradients were multiplied by."""
    return found._replace(
        gram=found.gram / unit[:, None, None] / unit[:, None, None],
        update_norm=found.update_norm / unit,
        mean_norm=found.mean_norm / unit,
    )


def _put(solved: Solved, found: Solved, group: Group) -> Solved:
    """Put what is known of a group's blocks among that of all."""
    mine = np.asarray(group.blocks)
    if group.member is None and np.array_equal(mine, np.arange(len(solved.gram))):
        return found

    def put(x: jax.Array, new: jax.Array) -> jax.Array:
        if group.member is not None:
            member = group.member.reshape(-1, *(1,) * (new.ndim - 1))
            new = jnp.where(member, new, x[mine])
        return x.at[mine].set(new)

    return jax.tree.map(put, solved, found)
