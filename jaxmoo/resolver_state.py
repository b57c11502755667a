"""What resolving keeps from step to step, whether by ``resolve_conflicts`` or in the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxmoo import aggregators
from jaxmoo.aggregators.weighing import in_types_of
from jaxmoo.block_solve import Group
from jaxmoo.errors import ConfigError
from jaxmoo.resolve import conflict_share

__all__ = [
    "ResolveConflictsState",
    "ResolverState",
    "SketchedConflictsState",
    "new_state",
    "next_state",
    "normalised",
    "step_key",
]


class ResolveConflictsState(NamedTuple):
    """State and last diagnostics of :func:`jaxmoo.resolve_conflicts`, and of the engine.

    Read them with ``optax.tree.get``. B blocks, K objectives. ``gram``, ``weights`` and
    ``skipped`` are None unless ``num_objectives`` was given.
    """

    step: jax.Array  # int32 []: updates so far
    key: jax.Array  # raw data of a PRNG key; step t uses fold_in(key, t)
    aggregator: Any  # one pytree per distinct aggregator, leaves [its blocks, ...]
    # float32 [B, K, K]: inner products of the objectives' gradients; infinite or 0 beyond its range
    gram: jax.Array | None
    weights: jax.Array | None  # float32 [B, K]: weight given to each objective
    conflict: jax.Array  # float32 [B]: share of pairs of objectives with negative inner product
    update_norm: jax.Array  # float32 [B]: norm of the resolved gradient
    mean_norm: jax.Array  # float32 [B]: norm of the objectives' (preference-weighted) mean
    skipped: jax.Array | None  # int32 [K]: steps in which the objective was non-finite somewhere


class SketchedConflictsState(NamedTuple):
    """:class:`ResolveConflictsState` where Gram matrices are estimated from sketches."""

    step: jax.Array
    key: jax.Array
    aggregator: Any
    gram: jax.Array | None  # estimated, and so is what follows from it
    weights: jax.Array | None
    conflict: jax.Array
    update_norm: jax.Array
    mean_norm: jax.Array
    skipped: jax.Array | None
    gram_error: jax.Array  # float32 [B]: relative error of gram (Frobenius norm), itself estimated


ResolverState = ResolveConflictsState | SketchedConflictsState


def new_state(
    num_blocks: int,
    groups: Sequence[Group],
    num_objectives: int | None,
    seed: int,
    *,
    sketched: bool = False,
) -> ResolverState:
    """Return the state before the first step.

    Args:
      num_blocks: B.
      groups: blocks by aggregator.
      num_objectives: K, or None where it is not known.
      seed: seed of aggregators that draw random numbers, and of sketches.
      sketched: whether Gram matrices are estimated.
    """
    b, k = num_blocks, num_objectives
    state = ResolveConflictsState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.key(seed)),
        aggregator=tuple(
            aggregators.init_blocks(group.aggregator, len(group.blocks), k or 0) for group in groups
        ),
        gram=None if k is None else jnp.zeros((b, k, k), jnp.float32),
        weights=None if k is None else jnp.zeros((b, k), jnp.float32),
        conflict=jnp.zeros(b, jnp.float32),
        update_norm=jnp.zeros(b, jnp.float32),
        mean_norm=jnp.zeros(b, jnp.float32),
        skipped=None if k is None else jnp.zeros(k, jnp.int32),
    )
    return SketchedConflictsState(*state, jnp.zeros(b, jnp.float32)) if sketched else state


def seeded(state: Any, seed: int) -> Any:
    """Return a state before the first step as another seed would have made it.

    Args:
      state: any pytree with states of :func:`new_state` in it, as arrays.
      seed: seed of aggregators that draw random numbers.

    Example:
      >>> state = {"resolver": new_state(1, (), 2, seed=0)}
      >>> key = seeded(state, 5)["resolver"].key
      >>> bool((key == new_state(1, (), 2, seed=5).key).all())
      True
    """

    def with_key(x: Any) -> Any:
        if not isinstance(x, ResolverState):
            return x
        key = jax.random.key_data(jax.random.key(seed))
        return x._replace(key=jax.device_put(key, x.key.sharding))

    return jax.tree.map(with_key, state, is_leaf=lambda x: isinstance(x, ResolverState))


def next_state(
    state: ResolverState,
    *,
    aggregator: Any,
    gram: jax.Array,
    weights: jax.Array,
    update_norm: jax.Array,
    mean_norm: jax.Array,
    nonfinite: jax.Array,
    gram_error: jax.Array,
    stop: bool,
) -> ResolverState:
    """Return the state after a step, in the types of the state before it.

    Args:
      state: the state before the step.
      aggregator: the aggregators' new states.
      gram: Gram matrices [B, K, K].
      weights: weights of the objectives [B, K].
      update_norm: norms of the resolved gradients [B].
      mean_norm: norms of the mean gradients [B].
      nonfinite: [B, K], true where an objective's gradient was not finite.
      gram_error: estimated relative errors of the Gram matrices [B].
      stop: whether a gradient that is not finite stops the program.
    """
    skipped = nonfinite.any(0)
    if stop:
        jax.debug.callback(_raise_nonfinite, skipped)
    after = ResolveConflictsState(
        step=jnp.asarray(optax.safe_increment(state.step)),
        key=state.key,
        aggregator=aggregator,
        gram=None if state.gram is None else gram,
        weights=None if state.weights is None else weights,
        conflict=conflict_share(gram),
        update_norm=update_norm,
        mean_norm=mean_norm,
        skipped=None if state.skipped is None else state.skipped + skipped,
    )
    if isinstance(state, SketchedConflictsState):
        return in_types_of(state, SketchedConflictsState(*after, gram_error))
    return in_types_of(state, after)


def step_key(state: ResolverState) -> jax.Array:
    """The PRNG key of the step that a state is before."""
    # Counters and keys of a state that was cast as a whole are integers again.
    key = jax.random.wrap_key_data(jnp.asarray(state.key).astype(jnp.uint32))
    return jax.random.fold_in(key, jnp.asarray(state.step).astype(jnp.int32))


def normalised(preference: Sequence[float] | jax.Array, k: int | None) -> jax.Array:
    """Return preferences [K] as weights that sum to 1.

    Args:
      preference: what was given; of a traced array only the shape is checked.
      k: K, where it is known.

    Raises:
      ConfigError: they are not K numbers >= 0 of which one is positive.
    """
    wrong = ConfigError(
        f"preference: expected {'K' if k is None else k} weights >= 0, not all zero; found "
        f"{preference!r}."
    )

    def check_shape(shape: tuple[int, ...]) -> None:
        if len(shape) != 1 or (k is not None and shape != (k,)):
            raise wrong

    if isinstance(preference, Tracer):
        check_shape(preference.shape)
        total = preference.sum()
        return preference / jnp.where(total > 0, total, 1)
    try:
        share = np.asarray(preference, np.float64)
    except (TypeError, ValueError):
        raise wrong from None
    check_shape(share.shape)
    if not (np.isfinite(share).all() and (share >= 0).all() and share.any()):
        raise wrong
    share = share / share.max()
    return jnp.asarray(share / share.sum(), float)


def _raise_nonfinite(nonfinite: np.ndarray) -> None:
    """Stop the program if any of the objectives [K] is non-finite."""
    if nonfinite.any():
        raise FloatingPointError(
            f"Non-finite gradient of objective(s) {np.flatnonzero(nonfinite).tolist()}. Lower the "
            "learning rate, check the data, or leave them out with nonfinite='skip'."
        )
