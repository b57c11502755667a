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
from jaxmoo.aggregators import Aggregator
from jaxmoo.blocks import Partition
from jaxmoo.errors import ConfigError
from jaxmoo.reductions import section_grams, weighted_sum

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
    active: jax.Array,
    preference: jax.Array | None = None,
    match_norm: bool = False,
) -> Resolution:
    """Resolve per-objective gradients into one gradient per array.

    Args:
      part: blocks of the arrays, without their objective axis.
      groups: aggregator of every block.
      leaves: per-objective gradients, each [K, ...].
      state: aggregator state, one pytree per group.
      key: PRNG key of this step.
      active: bool [K], False for objectives absent from this step.
      preference: weights of the objectives [K], or None for equal ones.
      match_norm: rescale each block's result to the norm of its mean gradient.

    Returns:
      The :class:`Resolution`. Non-finite gradients are left out of the blocks they occur in.
    """
    sections = [_sections(x, len(n)) for x, n in zip(leaves, part.labels, strict=True)]
    labels = np.concatenate(part.labels)
    grams = jax.ops.segment_sum(
        jnp.concatenate([section_grams(x) for x in sections]), labels, len(part)
    )
    finite = jnp.isfinite(jnp.diagonal(grams, axis1=1, axis2=2))  # [B, K]
    used = finite & active
    grams = jnp.where(used[:, :, None] & used[:, None, :], grams, 0)

    num_objectives = active.shape[0]
    weights = jnp.zeros((len(part), num_objectives), jnp.float32)
    new_state = []
    for group, group_state in zip(groups, state, strict=True):
        blocks = np.array(group.blocks)
        solved, group_state = aggregators.weigh_blocks(
            group.aggregator,
            grams[blocks],
            state=group_state,
            key=key,
            active=used[blocks],
            preference=preference,
        )
        new_state.append(group_state)
        if group.aggregator.combine is None:
            weights = weights.at[blocks].set(solved)

    share = jnp.ones(num_objectives) if preference is None else preference
    share = jnp.where(used, share, 0)
    share /= jnp.maximum(share.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    mean_norm = _norms(grams, share)
    update_norm = _norms(grams, weights)
    if match_norm:
        scale = _ratio(mean_norm, update_norm)
        weights, update_norm = weights * scale[:, None], update_norm * scale

    updates = [
        weighted_sum(x, weights[number]).reshape(leaf.shape[1:])
        for x, number, leaf in zip(sections, part.labels, leaves, strict=True)
    ]
    return Resolution(
        updates=updates,
        state=tuple(new_state),
        gram=grams,
        weights=weights,
        update_norm=update_norm,
        mean_norm=mean_norm,
        nonfinite=(~finite & active).any(0),
    )


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


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Quotient that is 1 where the denominator is 0."""
    safe = jnp.where(denominator > 0, denominator, 1)
    return jnp.where(denominator > 0, numerator / safe, 1)
