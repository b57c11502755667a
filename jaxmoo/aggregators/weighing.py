"""From Gram matrices to weights: the one place where awkward inputs are dealt with.

A method's own file holds only its mathematics. Everything below is done here once, the same for
every method:

* A row with a non-finite Gram diagonal is taken out and the preferences are renormalised.
* An objective flagged absent is taken out and the preferences are renormalised.
* An objective that is present but whose gradient in this block is exactly zero is indifferent
  to the block: it cannot conflict, so the method never sees it. Its preference is *not* handed to
  the others, which keeps the mean of a block equal to the block of the mean (see
  :func:`weigh_blocks` for when a zero row means absent).
* A block without any gradient gets weights of zero.
* With one objective left the update is its gradient.
* ``G`` is divided by a power of two so that its largest diagonal lies in [1, 2): no method has an
  absolute threshold, and scaling all gradients by a power of two scales the update exactly.
* The solve is float32; float64 for a float64 Gram matrix, which takes ``JAX_ENABLE_X64``. States
  keep the types they were made with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from jaxmoo.aggregators.aggregator import Aggregator, State, missing_key
from jaxmoo.dtypes import at_least_float32
from jaxmoo.errors import ConfigError
from jaxmoo.kernels.linear import diagonal, pairs

# A gradient smaller than 1e-18 of the block's largest counts as zero: below that float32 cannot
# hold its squared norm beside the others.
_TINY = 1e-36


class Prepared(NamedTuple):
    """A block's Gram matrix made safe for a method."""

    gram: jax.Array  # [K, K] float32 or float64, normalised, zero where inactive
    active: jax.Array  # [K] bool: present, finite and not zero
    preference: jax.Array  # [K], sums to 1 over active
    share: jax.Array  # []: preference of the active rows among those present
    number: jax.Array  # []: objectives present
    scale: jax.Array  # []: the power of two G was divided by


def _power_of_two(x: jax.Array) -> jax.Array:
    """The largest power of two not above a positive normal number; 1 for zero."""
    kind = jnp.finfo(x.dtype)
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"int{kind.bits}"))
    power = lax.bitcast_convert_type(bits & -(1 << kind.nmant), x.dtype)
    return jnp.where(power > 0, power, 1.0)


def prepare(
    gram: jax.Array,
    active: jax.Array | None = None,
    preference: jax.Array | None = None,
    *,
    cross: bool = False,
) -> Prepared:
    """Mask, renormalise and rescale the Gram matrix of one block.

    Args:
      gram: ``[K, K]``; rows of failed objectives may be non-finite.
      active: ``[K]`` bool, False for an absent objective. None: a zero row is absent.
      preference: ``[K]`` importances of the objectives, at least 0, any scale. None: all equal.
      cross: whether ``gram`` is ``J1 J2^T``, whose diagonal may be of any sign.

    Returns:
      The block as :class:`Prepared`.
    """
    gram = jnp.asarray(gram)
    gram = gram.astype(at_least_float32(gram.dtype))
    k = gram.shape[-1]
    present = jnp.isfinite(diagonal(gram))
    if active is not None:
        present = present & active
    gram = jnp.where(pairs(present), gram, 0.0)
    size = jnp.max(jnp.abs(gram), axis=1) if cross else diagonal(gram)
    scale = _power_of_two(jnp.max(size))
    gram = gram / scale
    touched = present & (size / scale > _TINY)
    if active is None:
        present = touched
    gram = jnp.where(pairs(touched), gram, 0.0)

    importance = jnp.ones(k) if preference is None else jnp.asarray(preference)
    importance = jnp.where(present, importance.astype(gram.dtype), 0.0)
    seen = jnp.where(touched, importance, 0.0)
    seen_total = jnp.sum(seen)
    share = seen_total / jnp.where(seen_total > 0, jnp.sum(importance), 1.0)
    return Prepared(
        gram=gram,
        active=touched,
        preference=seen / jnp.where(seen_total > 0, seen_total, 1.0),
        share=share,
        number=jnp.sum(present).astype(gram.dtype),
        scale=scale,
    )


def weigh_block(
    aggregator: Aggregator,
    gram: jax.Array,
    *,
    state: State | None = None,
    key: jax.Array | None = None,
    block: int | jax.Array = 0,
    active: jax.Array | None = None,
    preference: jax.Array | None = None,
    drawn: Any = None,
) -> tuple[jax.Array, State]:
    """Weights of one block.

    Args:
      aggregator: the method.
      gram: ``[K, K]`` Gram matrix of the block's gradients (``J1 J2^T`` when the method's
        ``cross_gram`` is set).
      state: the block's state; None starts a new one.
      key: key shared by all blocks; block b draws from ``jax.random.fold_in(key, b)``.
      block: the block's index b.
      active: ``[K]`` bool, False for an objective absent from this step. None: an objective whose
        gradient is zero is absent.
      preference: ``[K]`` importances, at least 0, any scale; None: all equal.
      drawn: what :func:`draw` gave for this key and block, where that was called beforehand.

    Returns:
      ``(weights, state)`` with weights ``[K]``, float32 or, of a float64 Gram matrix, float64;
      exactly 0 for every row taken out.

    Raises:
      ConfigError: if the method is stochastic and no key is given.
    """
    if drawn is None:
        drawn = draw(aggregator, key, block, gram.shape[-1])
    if state is None:
        state = aggregator.init(gram.shape[-1])
    return compiled(_weigh_block)(aggregator, gram, state, drawn, active, preference)


def draw(
    aggregator: Aggregator, key: jax.Array | None, block: int | jax.Array, num_objectives: int
) -> Any:
    """Draw what a method needs for one block.

    Args:
      aggregator: the method.
      key: key shared by all blocks; block b draws from ``jax.random.fold_in(key, b)``.
      block: the block's index b.
      num_objectives: K.

    Returns:
      What the method draws beforehand, or the block's key; None where it draws nothing.

    Raises:
      ConfigError: if the method is stochastic and no key is given.
    """
    if not aggregator.stochastic:
        return None
    key = _folded_key(aggregator, key, block)
    return key if aggregator.draw is None else aggregator.draw(key, num_objectives)


def _weigh_block(aggregator, gram, state, drawn, active, preference):
    preference = _importance(aggregator, preference, gram.shape[-1])
    ready = prepare(gram, active, preference, cross=aggregator.cross_gram)
    dtype = ready.gram.dtype
    start = jax.tree.map(lambda x: _in_type(x, dtype), state)
    gram = ready.gram * ready.scale if aggregator.compares_steps else ready.gram
    weights, new = aggregator.weigh(gram, ready.active, ready.preference, start, drawn)
    state = in_types_of(state, new)
    if aggregator.unit_scale:
        alone = jnp.sum(ready.active) == 1
        weights = jnp.where(alone, 1.0, weights)
    else:
        weights = weights * ready.scale**aggregator.gram_degree
    weights = (weights * _mass(aggregator, ready)).astype(dtype)
    return jnp.where(ready.active, weights, 0.0), state


def _in_type(x: Any, dtype: Any) -> jax.Array:
    """Numbers of a state in the type of a solve; counters stay as they are."""
    x = jnp.asarray(x)
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def in_types_of(before: State, after: State) -> State:
    """Return a state in the types of the one before it, as loops over steps require.

    Whatever type the gradients have.
    """
    return jax.tree.map(lambda x, old: x.astype(jnp.result_type(old)), after, before)


def weigh_blocks(
    aggregator: Aggregator,
    grams: jax.Array,
    *,
    state: State | None = None,
    key: jax.Array | None = None,
    active: jax.Array | None = None,
    preference: jax.Array | None = None,
) -> tuple[jax.Array, State]:
    """Weights of many blocks, solved as one batch.

    Block b gets exactly what :func:`weigh_block` gives it with ``block=b`` and the same key.

    An objective whose gradient is zero in every block given is taken for absent, and the others
    share its preference. One that is zero in some blocks only does not depend on these: there it
    is left out of the solve and keeps its share, so the mean stays the mean. Pass ``active`` to
    decide yourself.

    Args:
      aggregator: the method.
      grams: ``[B, K, K]``.
      state: state with leading axis ``[B]``; None starts a new one.
      key: one key for all blocks; block b draws from ``jax.random.fold_in(key, b)``.
      active: ``[K]`` or ``[B, K]`` bool, False for an absent objective.
      preference: ``[K]`` importances, at least 0, any scale; None: all equal.

    Returns:
      ``(weights, state)`` with weights ``[B, K]``, of the type :func:`weigh_block` gives.

    Raises:
      ConfigError: if the method is stochastic and no key is given.
    """
    num_blocks, k, _ = grams.shape
    if state is None:
        state = init_blocks(aggregator, num_blocks, k)
    if active is None:
        diagonals = jnp.diagonal(grams, axis1=1, axis2=2)
        active = jnp.any(diagonals != 0, axis=0)  # NaN counts: it is dealt with block by block
    active = jnp.broadcast_to(active, (num_blocks, k))
    drawn = jax.vmap(lambda block: draw(aggregator, key, block, k))(jnp.arange(num_blocks))
    return compiled(_weigh_blocks)(aggregator, grams, state, drawn, active, preference)


def _weigh_blocks(aggregator, grams, state, drawn, active, preference):
    def one(gram, state, drawn, active):
        return _weigh_block(aggregator, gram, state, drawn, active, preference)

    return jax.vmap(one)(grams, state, drawn, active)


def init_blocks(aggregator: Aggregator, num_blocks: int, num_objectives: int) -> State:
    """State of many blocks.

    Args:
      aggregator: the method.
      num_blocks: number of blocks B.
      num_objectives: number of objectives K.

    Returns:
      The method's state with a leading axis ``[B]`` on every leaf.
    """

    def repeat(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        # Of no weak type: a step returns it without, and would be compiled again.
        return jnp.broadcast_to(leaf.astype(leaf.dtype), (num_blocks, *leaf.shape))

    return jax.tree.map(repeat, aggregator.init(num_objectives))


def combine_block(
    aggregator: Aggregator,
    jacobian: jax.Array,
    *,
    key: jax.Array | None = None,
    block: int | jax.Array = 0,
    uniform: jax.Array | None = None,
    active: jax.Array | None = None,
    preference: jax.Array | None = None,
) -> jax.Array:
    """Update of one block by a coordinate-wise rule.

    The rows are dealt with as in :func:`weigh_block`. The rule looks at one coordinate at a time,
    so it may be applied to any piece of a block's gradients, provided ``active`` is given: which
    rows are finite must be decided for the whole block.

    Args:
      aggregator: a method with ``combine`` set.
      jacobian: ``[K, n]``, any float type.
      key: key shared by all blocks; block b draws from ``jax.random.fold_in(key, b)``.
      block: the block's index b.
      uniform: ``[n]`` numbers between 0 and 1 for a stochastic rule, drawn from the key when None.
        Give them to apply a rule to a piece of a larger array and get the piece of its result.
      active: ``[K]`` bool, False for an absent objective. None: a zero gradient is absent.
      preference: ``[K]`` importances, at least 0, any scale; None: all equal.

    Returns:
      The update ``[n]`` in the gradients' type.

    Raises:
      ConfigError: if the method is stochastic and no key is given.
    """
    if aggregator.stochastic and uniform is None:
        key = _folded_key(aggregator, key, block)
        uniform = jax.random.uniform(key, jacobian.shape[1:], jnp.float32)
    return compiled(_combine_block)(aggregator, jacobian, uniform, active, preference)


def _combine_block(aggregator, jacobian, uniform, active, preference):
    rows = jacobian.astype(at_least_float32(jacobian.dtype))
    size = largest_entries(rows)
    preference = _importance(aggregator, preference, jacobian.shape[0])
    ready = prepare(jnp.diag(size), active, preference)
    rows = jnp.where(ready.active[:, None], rows, 0.0)
    update = aggregator.combine(rows, ready.active, ready.preference, uniform)
    update = jnp.where(jnp.any(ready.active), update * _mass(aggregator, ready), 0.0)
    return update.astype(jacobian.dtype)


def largest_entries(jacobian: jax.Array) -> jax.Array:
    """Tell zero and non-finite gradients from others.

    For methods to which only that matters: a largest entry, unlike a sum of squares, cannot
    underflow.

    Args:
      jacobian: ``[K, n]``, any float type.

    Returns:
      ``[K]`` largest absolute entries, float32 or, of a float64 matrix, float64; NaN for a
      non-finite row.

    Example:
      >>> largest_entries(jnp.array([[1.0, -2.0], [jnp.inf, 0.0]])).tolist()
      [2.0, nan]
    """
    largest = jnp.max(jnp.abs(jacobian), axis=1, initial=0)
    largest = largest.astype(at_least_float32(jacobian.dtype))
    # XLA's maximum of many numbers may pass over a NaN. Zero times a non-finite number is NaN, and
    # a sum keeps it.
    finite = jnp.isfinite(jnp.sum(jacobian * 0, axis=1))
    return jnp.where(finite, largest, jnp.nan)


def _folded_key(aggregator: Aggregator, key: jax.Array | None, block: int | jax.Array) -> jax.Array:
    if key is None:
        raise missing_key(aggregator)
    return jax.random.fold_in(key, block)


def _importance(
    aggregator: Aggregator, preference: jax.Array | None, num_objectives: int
) -> jax.Array | None:
    if aggregator.importance is None:
        return preference
    fixed = jnp.asarray(aggregator.importance)
    if fixed.shape != (num_objectives,):
        raise ConfigError(
            f"Aggregator {aggregator.name!r} was given {fixed.shape[0]} weights, but there are "
            f"{num_objectives} objectives."
        )
    return fixed if preference is None else fixed * preference


def _mass(aggregator: Aggregator, ready: Prepared) -> jax.Array:
    """What the weights of an average are multiplied by; see the rules at the top."""
    return ready.share * ready.number if aggregator.summed else ready.share


@functools.cache
def _jitted(function: Callable) -> Callable:
    return jax.jit(function, static_argnums=0)


def compiled(function: Callable) -> Callable:
    """Compile a function of an aggregator and arrays when it is called outside of any ``jit``.

    Called eagerly, the solvers' loops would be compiled anew at every call.

    Args:
      function: ``(aggregator, *arrays) -> arrays``.

    Returns:
      The same function, compiled once per aggregator and shapes.
    """

    def call(aggregator: Aggregator, *arrays: Any) -> Any:
        # Inside jit even a constant is traced.
        leaves = (*jax.tree.leaves(arrays), jnp.zeros(()))
        traced = any(isinstance(leaf, Tracer) for leaf in leaves)
        return (function if traced else _jitted(function))(aggregator, *arrays)

    return call
