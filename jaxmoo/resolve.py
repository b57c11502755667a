"""Resolve the conflicts of every block at once: Gram matrices, one batched solve, one combination.

The functions here know blocks and aggregators, nothing of optax, languages or models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxmoo import aggregators
from jaxmoo.aggregators import Aggregator, combine_block
from jaxmoo.aggregators.solved import matching
from jaxmoo.block_solve import Grams, Group, Resolution, in_own_units, solve_blocks
from jaxmoo.blocks import Partition
from jaxmoo.blocks.sections import (
    Section,
    alike,
    cut,
    join,
    of_sections,
    section_place,
    sum_by_block,
    uniform_sections,
)
from jaxmoo.errors import ConfigError
from jaxmoo.kernels.reductions import (
    cross_grams,
    gram_parts,
    grams_in_range,
    is_partitioned,
    rows_of,
    scaled_grams,
    weighted_sum,
)
from jaxmoo.sharding import automatic, spec_of
from jaxmoo.sketched import grams_of_sketches, sketch_blocks

__all__ = [
    "conflict_share",
    "group_blocks",
    "resolve",
    "resolve_sections",
]


def group_blocks(
    part: Partition, choices: Mapping[str, str | Aggregator] | str | Aggregator
) -> tuple[Group, ...]:
    """Give every block its aggregator.

    Args:
      part: the blocks.
      choices: one aggregator for all, or a mapping from regular expressions over block names to
        aggregators; the first expression found in a block's name decides.

    Raises:
      ConfigError: a block matches no expression, or an expression is given that no block needs
        (where there are any).
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
        if not numbers and len(part):
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
    partitioned: bool | None = None,
    sketch: int | None = None,
) -> Resolution:
    """Resolve per-objective gradients into one gradient per array.

    Args:
      part: blocks of the arrays, without their objective axis.
      groups: aggregator of every block.
      leaves: per-objective gradients, each [K, ...]; at least one has elements.
      state: aggregator state, one pytree per group.
      key: PRNG key of this step; block b draws from ``fold_in(key, b)``.
      active: bool [K], False for objectives absent from this step. By default, an objective whose
        gradient is zero everywhere is absent.
      preference: weights of the objectives [K], or None for equal ones.
      match_norm: rescale each block's result to the norm of its mean gradient, unless it is
        stationary to within rounding.
      second: the same gradients of an independent second batch, for aggregators that need one.
      partitioned: see :func:`jaxmoo.kernels.reductions.section_grams`.
      sketch: size of the sketches that Gram matrices are estimated from; None for exact ones.

    Returns:
      The :class:`Resolution`. Non-finite gradients are left out of the blocks they occur in.
    """

    def compute(
        leaves: Sequence[jax.Array],
        second: Sequence[jax.Array] | None,
        state: Sequence[Any],
        key: jax.Array,
        active: jax.Array | None,
        preference: jax.Array | None,
    ) -> Resolution:
        held = [index for index, x in enumerate(leaves) if x.size]
        sections = [
            Section(
                cut(x, len(labels)),
                labels,
                uniform_sections(index, x.shape[1:], len(labels)),
                places=section_place(index, np.arange(len(labels))),
            )
            for index, x, labels in ((i, leaves[i], part.labels[i]) for i in held)
        ]
        resolved = resolve_sections(
            sections,
            groups,
            np.arange(len(part)),
            state=state,
            key=key,
            active=active,
            preference=preference,
            match_norm=match_norm,
            partitioned=partitioned,
            many=True,
            rescale=True,
            sketch=sketch,
            sparse=np.asarray(part.sparse) if any(part.sparse) else None,
            second=None if second is None else [cut(second[i], len(part.labels[i])) for i in held],
        )
        updates = [x.reshape(x.shape[1:]) if not x.size else x for x in leaves]
        for i, update in zip(held, resolved.updates, strict=True):
            updates[i] = update.reshape(leaves[i].shape[1:])
        return resolved._replace(updates=updates)

    specs: dict[str, Any] = dict.fromkeys(Resolution._fields, P())
    specs["updates"] = [P(*spec_of(x)[1:]) for x in leaves]
    arguments = (leaves, second, state, key, active, preference)
    return automatic(compute, arguments, Resolution(**specs))


def resolve_sections(
    sections: Sequence[Section],
    groups: Sequence[Group],
    numbers: Any,
    *,
    state: Sequence[Any],
    key: jax.Array,
    active: jax.Array | None,
    preference: jax.Array | None,
    match_norm: bool,
    second: Sequence[jax.Array] | None = None,
    partitioned: bool | None = None,
    platform: str | None = None,
    many: bool = False,
    rescale: bool = False,
    sketch: int | None = None,
    sparse: Any = None,
    total: Callable[[jax.Array], jax.Array] = lambda x: x,
    pooled: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> Resolution:
    """Resolve B blocks whose gradients are given as sections; see :func:`resolve`.

    Args:
      sections: one per array.
      groups: aggregator of every block; ``blocks`` index into the B blocks.
      numbers: int [B], the number from which each block's key is made.
      state: see :func:`resolve`.
      key: see :func:`resolve`.
      active: see :func:`resolve`.
      preference: see :func:`resolve`.
      match_norm: see :func:`resolve`.
      second: values of the sections of a second batch.
      partitioned: see :func:`jaxmoo.kernels.reductions.section_grams`.
      platform: likewise; on a GPU a solve is one kernel as well.
      many: whether these are so many arrays, such as all of a model, that compiling the program
        counts. It then takes forms that compile quickly: small arrays are joined, and equal kernels
        serve arrays of one shape. All sections of theirs are counted.
      rescale: whether gradients whose squares leave float32's range are scaled, in up to three more
        passes over them. Else the largest count as not finite, the smallest as zero.
      sketch: see :func:`resolve`; for blocks without other pieces.
      sparse: bool [B], blocks from which objectives are absent whose gradient is zero in them; or
        None.
      total: sums a quantity over the devices that hold the blocks' other pieces.
      pooled: averages Gram matrices over replicas.

    Returns:
      The :class:`Resolution`; its updates have the shape of the sections, [S, ...].
    """
    numbers = jnp.asarray(numbers)
    num_blocks = len(numbers)
    labels = [jnp.asarray(section.labels) for section in sections]
    values = [section.values for section in sections]

    # Arrays that the compiler divides would be gathered to be joined.
    alone = not many or is_partitioned(partitioned)
    together = [[i] for i in range(len(values))] if alone else alike(values)
    places = [jnp.concatenate([labels[i] for i in some]) for some in together]

    def joined(arrays: Sequence[jax.Array]) -> list[jax.Array]:
        return [join([arrays[i] for i in some]) for some in together]

    def blocks_of(parts: Sequence[jax.Array]) -> jax.Array:
        """Sums [B, ...] of sections' quantities, each given in parts [S, P, ...]."""
        counted = [x * s.counted for x, s in zip(parts, sections, strict=True)]
        return total(sum_by_block(counted, labels, num_blocks))

    def blocks_of_joined(parts: Sequence[jax.Array]) -> jax.Array:
        """The same of what was made of joined arrays."""
        return blocks_of(parts) if alone else total(sum_by_block(parts, places, num_blocks))

    def scaled(unit: jax.Array, others: Sequence[jax.Array] | None = None) -> jax.Array:
        rows = joined(values)
        columns = rows if others is None else joined(others)
        return blocks_of_joined(
            [
                scaled_grams(x, unit[n], y, partitioned=partitioned)[:, None]
                for x, n, y in zip(rows, places, columns, strict=True)
            ]
        )

    def exact() -> Grams:
        grams = gram_parts(joined(values), partitioned=partitioned, platform=platform)
        grams = pooled(blocks_of_joined(grams))
        unit = jnp.ones(num_blocks, grams.dtype)
        if rescale:
            grams, unit = grams_in_range(grams, active, scaled)
        return Grams(grams, unit, jnp.zeros_like(unit))

    if sketch is None:
        grams = exact()
    else:
        z = sketch_blocks(sections, numbers, sketch, key=key, platform=platform)
        grams = grams_of_sketches(z, active=active, rescale=rescale)
    unit, crossed = grams.unit, None
    present = grams.taking_part(grams.present if active is None else active, sparse)
    if any(group.aggregator.cross_gram for group in groups):
        if second is None:
            raise ConfigError(
                "sdmgrad and modo need the gradients of an independent second batch: pass "
                "second=, shaped like the updates."
            )
        crossed = jax.lax.cond(
            (unit == 1).all(),
            lambda unit: blocks_of(
                [cross_grams(s.values, y)[:, None] for s, y in zip(sections, second, strict=True)]
            ),
            lambda unit: scaled(unit, second),
            unit,
        )
    found = solve_blocks(
        grams,
        groups,
        numbers,
        crossed=crossed,
        state=state,
        key=key,
        active=present,
        preference=preference,
        match_norm=match_norm,
        platform=platform,
    )
    if many:
        weights = rows_of(found.weights, labels)
    else:
        weights = [of_sections(found.weights, n) for n in labels]
    updates = [
        weighted_sum(x, w, partitioned=partitioned, many=many)
        for x, w in zip(values, weights, strict=True)
    ]
    update_norm, used = found.update_norm, present & ~found.nonfinite
    for group in groups:
        if group.aggregator.combine is None:
            continue
        member = _members(group, num_blocks)
        updates = [
            _combine(group, s, u, numbers[n], member[n], used[n], key, preference)
            if _may_hold(s, group)
            else u
            for s, u, n in zip(sections, updates, labels, strict=True)
        ]
        norms = jnp.sqrt(
            blocks_of(
                [
                    ((u.reshape(len(u), -1) * unit[n, None]) ** 2).sum(1, keepdims=True)
                    for u, n in zip(updates, labels, strict=True)
                ]
            )
        )
        if match_norm:
            scale = jax.vmap(matching)(found.mean_norm, norms, found.gram)
            scale = jnp.where(member, scale, 1)
            updates = [
                u * scale[n].reshape(-1, *(1,) * (u.ndim - 1)).astype(u.dtype)
                for u, n in zip(updates, labels, strict=True)
            ]
            norms = norms * scale
        update_norm = jnp.where(member, norms, update_norm)
    return in_own_units(found._replace(updates=updates, update_norm=update_norm), unit)


def _members(group: Group, num_blocks: int) -> jax.Array:
    """Which blocks belong to a group, bool [B]."""
    member = True if group.member is None else group.member
    return jnp.zeros(num_blocks, bool).at[np.asarray(group.blocks)].set(member)


def _may_hold(section: Section, group: Group) -> bool:
    """Whether any of an array's sections can lie in the group's blocks."""
    if not isinstance(section.labels, np.ndarray):
        return True
    return bool(np.isin(section.labels, group.blocks).any())


def _combine(
    group: Group,
    section: Section,
    update: jax.Array,
    numbers: jax.Array,
    member: jax.Array,
    used: jax.Array,
    key: jax.Array,
    preference: jax.Array | None,
) -> jax.Array:
    """Replace the updates of sections in a group's blocks by those of its coordinate-wise rule."""
    x = section.values

    def combine(rows: jax.Array, active: jax.Array, uniform: jax.Array | None) -> jax.Array:
        return combine_block(
            group.aggregator,
            rows.reshape(rows.shape[0], -1),
            uniform=None if uniform is None else uniform.reshape(-1),
            active=active,
            preference=preference,
        ).reshape(rows.shape[1:])

    uniform = None
    if group.aggregator.stochastic:
        assert section.uniform is not None
        uniform = section.uniform(key, numbers)
    ruled = jax.vmap(combine, in_axes=(1, 0, None if uniform is None else 0))(x, used, uniform)
    return jnp.where(member.reshape(-1, *(1,) * (update.ndim - 1)), ruled, update)


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
