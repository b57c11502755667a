"""Resolve the conflicts of every block at once: Gram matrices, one batched solve, one combination.

The functions here know blocks and aggregators, nothing of optax, languages or models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoo import aggregators
from jaxmoo.aggregators import Aggregator, combine_block, weigh_block
from jaxmoo.blocks import Partition
from jaxmoo.errors import ConfigError
from jaxmoo.reductions import section_cross_grams, section_grams, weighted_sum

__all__ = ["Group", "Resolution", "conflict_share", "group_blocks", "resolve"]


class Group(NamedTuple):
    """Blocks that share an aggregator, and so are solved as one batch."""

    aggregator: Aggregator
    blocks: tuple[int, ...]


class Resolution(NamedTuple):
    """What :func:`resolve` returns. B blocks, K objectives."""

    updates: list[jax.Array]  # one array per input array, without the objective axis
    state: tuple[Any, ...]  # new aggregator state, one pytree per group
    gram: jax.Array  # float32 [B, K, K]; rows of objectives left out are zero
    weights: jax.Array  # float32 [B, K]; zero in blocks resolved coordinate by coordinate
    update_norm: jax.Array  # float32 [B]
    mean_norm: jax.Array  # float32 [B]
    nonfinite: jax.Array  # bool [K]: present, but non-finite in some block


def group_blocks(
    part: Partition, choices: Mapping[str, str | Aggregator] | str | Aggregator
) -> tuple[Group, ...]:
    """Give every block its aggregator.

    Args:
      part: the blocks.
      choices: one aggregator for all, or a mapping from regular expressions over block names to
        aggregators; the first expression found in a block's name decides.

    Raises:
      ConfigError: a block matches no expression, or an expression is given that no block needs.
    """
    if not isinstance(choices, Mapping):
        return (Group(aggregators.get(choices), tuple(range(len(part)))),)
    members: dict[str, list[int]] = {pattern: [] for pattern in choices}
    for number, name in enumerate(part.names):
        pattern = next((p for p in choices if re.search(p, name)), None)
        if pattern is None:
            raise ConfigError(
                f"No aggregator for block {name!r}: it matches none of {list(choices)}. "
                "Add a last entry '.*' for the rest."
            )
        members[pattern].append(number)
    for pattern, numbers in members.items():
        if not numbers:
            raise ConfigError(
                f"The pattern {pattern!r} is the first match of no block. Blocks are "
                f"{', '.join(part.names[:8])}{', ...' if len(part) > 8 else ''}."
            )
    return tuple(Group(aggregators.get(choices[p]), tuple(b)) for p, b in members.items())


def resolve(
    part: Partition,
    groups: Sequence[Group],
    leaves: Sequence[jax.Array],
    *,
    state: Sequence[Any],
    key: jax.Array,
    active: jax.Array | None = None,
    preference: jax.Array | None = None,
    match_norm: bool = False,
    second: Sequence[jax.Array] | None = None,
) -> Resolution:
    """Resolve per-objective gradients into one gradient per array.

    Args:
      part: blocks of the arrays, without their objective axis.
      groups: aggregator of every block.
      leaves: per-objective gradients, each [K, ...].
      state: aggregator state, one pytree per group.
      key: PRNG key of this step; block b draws from ``fold_in(key, b)``.
      active: bool [K], False for objectives absent from this step. By default, an objective whose
        gradient is zero everywhere is absent.
      preference: weights of the objectives [K], or None for equal ones.
      match_norm: rescale each block's result to the norm of its mean gradient, unless it is
        stationary to within rounding.
      second: the same gradients of an independent second batch, for aggregators that need one.

    Returns:
      The :class:`Resolution`. Non-finite gradients are left out of the blocks they occur in.
    """
    sections = [_sections(x, len(n)) for x, n in zip(leaves, part.labels, strict=True)]
    labels = np.concatenate(part.labels)
    grams = jax.ops.segment_sum(
        jnp.concatenate([section_grams(x) for x in sections]), labels, len(part)
    )
    squares = jnp.diagonal(grams, axis1=1, axis2=2)  # [B, K]
    present = (squares != 0).any(0) if active is None else active
    finite = jnp.isfinite(squares)
    used = finite & present
    grams = jnp.where(used[:, :, None] & used[:, None, :], grams, 0)

    products = {False: grams}  # what an aggregator reads, by whether it needs two batches
    if any(group.aggregator.cross_gram for group in groups):
        if second is None:
            raise ConfigError(
                "sdmgrad and modo need the gradients of an independent second batch: pass "
                "second=, shaped like the updates."
            )
        products[True] = jax.ops.segment_sum(
            jnp.concatenate(
                [
                    section_cross_grams(x, _sections(y, x.shape[1]))
                    for x, y in zip(sections, second, strict=True)
                ]
            ),
            labels,
            len(part),
        )

    weights = jnp.zeros(used.shape, jnp.float32)
    new_state = []
    for group, group_state in zip(groups, state, strict=True):
        if group.aggregator.combine is None:
            numbers = np.array(group.blocks)
            solved, group_state = jax.vmap(
                lambda gram, state, number, active, method=group.aggregator: weigh_block(
                    method,
                    gram,
                    state=state,
                    key=key,
                    block=number,
                    active=active,
                    preference=preference,
                )
            )(products[group.aggregator.cross_gram][numbers], group_state, numbers, used[numbers])
            weights = weights.at[numbers].set(solved)
        new_state.append(group_state)
    mean_norm = _norms(grams, _share(used, preference))
    update_norm = _norms(grams, weights)
    if match_norm:
        scale = _matching(mean_norm, update_norm, grams)
        weights, update_norm = weights * scale[:, None], update_norm * scale
    updates = [weighted_sum(x, weights[n]) for x, n in zip(sections, part.labels, strict=True)]
    for group in groups:
        if group.aggregator.combine is not None:
            updates = _combine_coordinates(
                part, group, sections, updates, used, key=key, preference=preference
            )
            squares = jnp.concatenate([(u.reshape(len(u), -1) ** 2).sum(1) for u in updates])
            norms = jnp.sqrt(jax.ops.segment_sum(squares, labels, len(part)))
            if match_norm:
                scale = _matching(mean_norm, norms, grams)
                scale = jnp.where(_members(part, group), scale, 1)
                updates, norms = _rescale(part, updates, scale), norms * scale
            update_norm = jnp.where(_members(part, group), norms, update_norm)
    return Resolution(
        updates=[u.reshape(x.shape[1:]) for u, x in zip(updates, leaves, strict=True)],
        state=tuple(new_state),
        gram=grams,
        weights=weights,
        update_norm=update_norm,
        mean_norm=mean_norm,
        nonfinite=(~finite & present).any(0),
    )


def _combine_coordinates(
    part: Partition,
    group: Group,
    sections: Sequence[jax.Array],
    updates: Sequence[jax.Array],
    used: jax.Array,
    *,
    key: jax.Array,
    preference: jax.Array | None,
) -> list[jax.Array]:
    """Replace the updates of a group's blocks by those of its coordinate-wise rule."""
    members = _members(part, group)
    result = []
    for index, (x, update, numbers) in enumerate(zip(sections, updates, part.labels, strict=True)):
        if not members[numbers].any():
            result.append(update)
            continue
        # Sections of one block draw independently.
        places = index * 65_536 + np.arange(len(numbers))

        def combine(section: jax.Array, number: Any, place: Any) -> jax.Array:
            return combine_block(
                group.aggregator,
                section.reshape(section.shape[0], -1),
                key=jax.random.fold_in(key, place),
                block=number,
                active=used[number],
                preference=preference,
            ).reshape(section.shape[1:])

        ruled = jax.vmap(combine, in_axes=(1, 0, 0))(x, numbers, places)
        mine = members[numbers].reshape(-1, *(1,) * (update.ndim - 1))
        result.append(jnp.where(mine, ruled, update))
    return result


def _members(part: Partition, group: Group) -> np.ndarray:
    """Which blocks belong to a group, bool [B]."""
    return np.isin(np.arange(len(part)), group.blocks)


def _rescale(part: Partition, updates: Sequence[jax.Array], scale: jax.Array) -> list[jax.Array]:
    """Multiply every section by its block's factor."""
    return [
        u * scale[n].reshape(-1, *(1,) * (u.ndim - 1)).astype(u.dtype)
        for u, n in zip(updates, part.labels, strict=True)
    ]


def _share(used: jax.Array, preference: jax.Array | None) -> jax.Array:
    """Weights of the mean gradient over the objectives used, [B, K]."""
    share = jnp.where(used, 1.0 if preference is None else preference, 0)
    return share / jnp.maximum(share.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def conflict_share(grams: jax.Array) -> jax.Array:
    """Share of pairs of present objectives whose gradients have a negative inner product.

    Args:
      grams: Gram matrices [..., K, K]; an objective with a zero row is absent.

    Returns:
      Shares [...], 0 where fewer than two objectives are present.

    Example:
      >>> conflict_share(jnp.array([[1.0, -1.0], [-1.0, 2.0]]))
      Array(1., dtype=float32)
    """
    present = jnp.diagonal(grams, axis1=-2, axis2=-1) > 0
    count = present.sum(-1)
    pairs = count * (count - 1)
    return (grams < 0).sum((-2, -1)) / jnp.maximum(pairs, 1).astype(jnp.float32)


def _sections(x: jax.Array, count: int) -> jax.Array:
    """View [K, *shape] as [K, S, ...]; sections are equal parts of the leading axis."""
    if count == 1:
        return x[:, None]
    if x.ndim > 1 and x.shape[1] == count:
        return x
    return x.reshape(x.shape[0], count, -1)


def _norms(grams: jax.Array, weights: jax.Array) -> jax.Array:
    squares = jnp.einsum(
        "bi,bij,bj->b", weights, grams, weights, precision=jax.lax.Precision.HIGHEST
    )
    return jnp.sqrt(jnp.maximum(squares, 0))


def _matching(mean_norm: jax.Array, update_norm: jax.Array, grams: jax.Array) -> jax.Array:
    """Factors that bring each block's update to its mean gradient's norm."""
    # In float32 a norm this far below the gradients' is rounding: the block is stationary, and
    # scaling it up would make a step of noise.
    largest = jnp.diagonal(grams, axis1=1, axis2=2).max(1)
    stationary = update_norm**2 <= 1e-5 * largest
    return jnp.where(stationary, 1, mean_norm / jnp.where(stationary, 1, update_norm))
