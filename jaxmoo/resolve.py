"""Resolve the conflicts of every block at once: Gram matrices, one batched solve, one combination.

The functions here know blocks and aggregators, nothing of optax, languages or models.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxmoo import aggregators
from jaxmoo.aggregators import Aggregator, combine_block, weigh_block
from jaxmoo.aggregators.solvers import mean_norm as norm_of
from jaxmoo.aggregators.weighing import draw
from jaxmoo.blocks import Partition
from jaxmoo.errors import ConfigError
from jaxmoo.kernels.launch import in_one_launch, solving_on
from jaxmoo.kernels.linear import diagonal, pairs
from jaxmoo.kernels.reductions import (
    cross_grams,
    gram_parts,
    grams_in_range,
    scaled_grams,
    section_sizes,
    weighted_sum,
)
from jaxmoo.sharding import automatic, spec_of

__all__ = [
    "Group",
    "Resolution",
    "Section",
    "conflict_share",
    "group_blocks",
    "resolve",
    "resolve_sections",
]


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


class Section(NamedTuple):
    """Per-objective gradients of one array, or of one device's piece of it, cut into sections.

    A section lies in one block. K objectives, S sections.
    """

    values: jax.Array  # [K, S, ...]
    labels: Any  # int [S]: the block each section belongs to
    # (key, labels' block numbers [S]) -> uniform numbers [S, ...] for coordinate-wise rules
    uniform: Callable[[jax.Array, jax.Array], jax.Array]
    # 0 where another device holds the same values and counts them, else 1
    counted: jax.Array | float = 1.0


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
            Section(cut(x, len(labels)), labels, uniform_sections(index, x.shape[1:], len(labels)))
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
            rescale=True,
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
    rescale: bool = False,
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
      rescale: whether gradients whose squares leave float32's range are scaled, in a second and
        third pass over them. Else the largest count as not finite, the smallest as zero.
      total: sums a quantity over the devices that hold the blocks' other pieces.
      pooled: averages Gram matrices over replicas.

    Returns:
      The :class:`Resolution`; its updates have the shape of the sections, [S, ...].
    """
    numbers = jnp.asarray(numbers)
    num_blocks = len(numbers)
    labels = [jnp.asarray(section.labels) for section in sections]
    every = jnp.concatenate(labels)

    def blocks_of(parts: Sequence[jax.Array]) -> jax.Array:
        """Sums [B, ...] of sections' quantities, each given in parts [S, P, ...]."""
        counted = [x * s.counted for x, s in zip(parts, sections, strict=True)]
        return total(_sum_by_block(counted, labels, num_blocks))

    def scaled(unit: jax.Array, others: Sequence[Any]) -> jax.Array:
        return blocks_of(
            [
                scaled_grams(s.values, unit[n], y, partitioned=partitioned)[:, None]
                for s, n, y in zip(sections, labels, others, strict=True)
            ]
        )

    values = [s.values for s in sections]
    grams = gram_parts(values, partitioned=partitioned, platform=platform)
    grams = pooled(blocks_of(grams))
    # In each block, gradients have been multiplied by it where they meet each other.
    unit = jnp.ones(num_blocks, grams.dtype)
    if rescale:
        grams, unit = grams_in_range(
            grams,
            active,
            lambda: jax.ops.segment_max(
                jnp.concatenate(
                    [section_sizes(s.values, partitioned=partitioned) for s in sections]
                ),
                every,
                num_blocks,
            ),
            lambda unit: scaled(unit, [None] * len(sections)),
        )
    present = (jnp.diagonal(grams, axis1=1, axis2=2) != 0).any(0) if active is None else active

    products = {False: grams}  # what an aggregator reads, by whether it needs two batches
    if any(group.aggregator.cross_gram for group in groups):
        if second is None:
            raise ConfigError(
                "sdmgrad and modo need the gradients of an independent second batch: pass "
                "second=, shaped like the updates."
            )
        products[True] = jax.lax.cond(
            (unit == 1).all(),
            lambda unit: blocks_of(
                [cross_grams(s.values, y)[:, None] for s, y in zip(sections, second, strict=True)]
            ),
            lambda unit: scaled(unit, second),
            unit,
        )

    solved = _unsolved(num_blocks, len(present), grams.dtype)
    power = jnp.ones_like(unit)  # by which weights depend on what gradients were multiplied by
    new_state = []
    for group, group_state in zip(groups, state, strict=True):
        method, mine = group.aggregator, np.asarray(group.blocks)
        solve = jax.vmap(
            functools.partial(
                _solve_block,
                method,
                active=present,
                preference=preference,
                key=key,
                match_norm=match_norm,
            )
        )
        with solving_on(platform):
            found, group_state = solve(
                grams[mine], products[method.cross_gram][mine], group_state, numbers[mine]
            )
        solved = _put(solved, found, group)
        if not method.unit_scale:
            power = power.at[mine].set(unit[mine] ** (-2 * method.gram_degree))
        new_state.append(group_state)
    weights, update_norm, mean_norm = solved.weights, solved.update_norm, solved.mean_norm
    if rescale and not match_norm:
        weights, update_norm = weights * power[:, None], update_norm * power
    grams, used = solved.gram, present & ~solved.nonfinite
    updates = [
        weighted_sum(s.values, _of_sections(weights, n), partitioned=partitioned)
        for s, n in zip(sections, labels, strict=True)
    ]
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
            scale = jnp.where(member, jax.vmap(_matching)(mean_norm, norms, grams), 1)
            updates = [
                u * scale[n].reshape(-1, *(1,) * (u.ndim - 1)).astype(u.dtype)
                for u, n in zip(updates, labels, strict=True)
            ]
            norms = norms * scale
        update_norm = jnp.where(member, norms, update_norm)
    return Resolution(
        updates=updates,
        state=tuple(new_state),
        gram=grams / unit[:, None, None] / unit[:, None, None],
        weights=weights,
        update_norm=update_norm / unit,
        mean_norm=mean_norm / unit,
        nonfinite=solved.nonfinite,
    )


class _Solved(NamedTuple):
    """What the Gram matrix of a block gives; [B, ...] of B blocks."""

    gram: jax.Array  # [K, K], zero where an objective is left out
    nonfinite: jax.Array  # bool [K]: present, but not finite
    weights: jax.Array  # [K]
    mean_norm: jax.Array  # []
    update_norm: jax.Array  # []


def _unsolved(num_blocks: int, k: int, dtype: Any) -> _Solved:
    """Those of blocks that no group solves."""
    shapes: list[tuple[int, ...]] = [(k, k), (k,), (k,), (), ()]
    return _Solved(*(jnp.zeros((num_blocks, *shape), dtype) for shape in shapes))._replace(
        nonfinite=jnp.zeros((num_blocks, k), bool)
    )


def _put(solved: _Solved, found: _Solved, group: Group) -> _Solved:
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


def _solve_block(
    method: Aggregator,
    gram: jax.Array,
    product: jax.Array,
    state: Any,
    number: jax.Array,
    *,
    active: jax.Array,
    preference: jax.Array | None,
    key: jax.Array,
    match_norm: bool,
) -> tuple[_Solved, Any]:
    """Solve one block, given its Gram matrix and the one that the method reads."""
    if method.elementary:
        importance = None if preference is None else preference.astype(gram.dtype)
        drawn = draw(method, key, number, len(active))
        found = _solve_elementary(
            gram, active, importance, drawn, method=method, match_norm=match_norm
        )
        return found, state

    def weigh(gram: jax.Array, used: jax.Array) -> tuple[jax.Array, Any]:
        if method.combine is not None:
            return jnp.zeros(len(active), gram.dtype), state
        return weigh_block(
            method,
            product if method.cross_gram else gram,
            state=state,
            key=key,
            block=number,
            active=used,
            preference=preference,
        )

    return _solve(gram, active, preference, weigh, match_norm)


@in_one_launch
def _solve_elementary(
    gram: jax.Array,
    active: jax.Array,
    preference: jax.Array | None,
    drawn: jax.Array | None,
    *,
    method: Aggregator,
    match_norm: bool,
) -> _Solved:
    """Solve one block by a method of which a kernel takes everything."""

    def weigh(gram: jax.Array, used: jax.Array) -> tuple[jax.Array, Any]:
        return weigh_block(method, gram, active=used, preference=preference, drawn=drawn)

    return _solve(gram, active, preference, weigh, match_norm)[0]


def _solve(
    gram: jax.Array,
    active: jax.Array,
    preference: jax.Array | None,
    weigh: Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]],
    match_norm: bool,
) -> tuple[_Solved, Any]:
    """Weigh one block's objectives, without those that are not finite, and measure the update."""
    finite = jnp.isfinite(diagonal(gram))
    used = active & finite
    gram = jnp.where(pairs(used), gram, 0.0)
    weights, state = weigh(gram, used)
    mean_norm = norm_of(gram, _share(used, preference, gram.dtype))
    update_norm = norm_of(gram, weights)
    if match_norm:
        scale = _matching(mean_norm, update_norm, gram)
        weights, update_norm = weights * scale, update_norm * scale
    return _Solved(gram, active & ~finite, weights, mean_norm, update_norm), state


# Numbers up to which sums by block go over all sections, block by block.
_FEW = 2**20


@jax.named_scope("gram")
def _sum_by_block(
    parts: Sequence[jax.Array], labels: Sequence[jax.Array], num_blocks: int
) -> jax.Array:
    """Sums [B, ...] of sections' quantities [S, P, ...] by the block each lies in, int [S]."""
    if num_blocks > 1 and sum(x.size for x in parts) * num_blocks > _FEW:
        parts = [x.sum(1, keepdims=True) for x in parts]
    every = jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in parts])
    if num_blocks == 1:
        return every.sum(0, keepdims=True)
    pairs = zip(parts, labels, strict=True)
    block = jnp.concatenate([jnp.repeat(n, x.shape[1]) for x, n in pairs])
    if every.size * num_blocks > _FEW:
        return jax.ops.segment_sum(every, block, num_blocks)
    # A scatter is slow on GPUs. What lies in other blocks is selected away: it may not be finite.
    mine = block == jnp.arange(num_blocks)[:, None]
    mine = mine.reshape(*mine.shape, *(1,) * (every.ndim - 1))
    return jnp.where(mine, every, 0).sum(1)


def _of_sections(x: jax.Array, labels: jax.Array) -> jax.Array:
    """Quantities [S, ...] of the blocks [B, ...] that sections lie in."""
    return jnp.broadcast_to(x, (len(labels), *x.shape[1:])) if len(x) == 1 else x[labels]


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

    uniform = section.uniform(key, numbers) if group.aggregator.stochastic else None
    ruled = jax.vmap(combine, in_axes=(1, 0, None if uniform is None else 0))(x, used, uniform)
    return jnp.where(member.reshape(-1, *(1,) * (update.ndim - 1)), ruled, update)


def uniform_sections(
    index: int, shape: Sequence[int], count: int
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Make the source of random numbers of one whole array.

    Args:
      index: number of the array; sections of one block draw independently.
      shape: the array's shape.
      count: S, sections.

    Returns:
      ``(key, block numbers [S]) -> float32 [S, size / S]``.
    """
    size = math.prod(shape) // count

    def uniform(key: jax.Array, numbers: jax.Array) -> jax.Array:
        return jax.vmap(lambda place, number: section_uniform(key, place, number, (size,)))(
            section_place(index, np.arange(count)), numbers
        )

    return uniform


def section_place(index: int, section: Any) -> Any:
    """Number that no other section of any array has."""
    return index * 65_536 + section


def section_uniform(key: jax.Array, place: Any, number: Any, shape: tuple[int, ...]) -> jax.Array:
    """Uniform random numbers of one section, from the step's key, its place and its block."""
    key = jax.random.fold_in(jax.random.fold_in(key, place), number)
    return jax.random.uniform(key, shape, jnp.float32)


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


def cut(x: jax.Array, count: int) -> jax.Array:
    """View [K, *shape] as [K, S, ...]; sections are equal parts of the leading axis."""
    if count == 1:
        return x[:, None]
    if x.ndim > 1 and x.shape[1] == count:
        return x
    return x.reshape(x.shape[0], count, -1)


def _share(used: jax.Array, preference: jax.Array | None, dtype: Any) -> jax.Array:
    """Weights of the mean gradient over the objectives used, [K]."""
    share = jnp.where(used, 1.0 if preference is None else preference, 0).astype(dtype)
    return share / jnp.maximum(jnp.sum(share), float(jnp.finfo(dtype).tiny))


def _matching(mean_norm: jax.Array, update_norm: jax.Array, gram: jax.Array) -> jax.Array:
    """Factor that brings a block's update to its mean gradient's norm."""
    # A norm this far below the gradients' is rounding (its square, 1e-5 of theirs in float32): the
    # block is stationary, and scaling it up would make a step of noise.
    largest = jnp.max(diagonal(gram))
    stationary = update_norm**2 <= 84 * float(jnp.finfo(gram.dtype).eps) * largest
    return jnp.where(stationary, 1.0, mean_norm / jnp.where(stationary, 1.0, update_norm))
