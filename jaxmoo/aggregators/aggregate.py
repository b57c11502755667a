"""Apply an aggregator to one matrix of gradients."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec as P

from jaxmoo.aggregators.aggregator import Aggregator, State, get, missing_key
from jaxmoo.aggregators.weighing import combine_block, compiled, largest_entries, weigh_block
from jaxmoo.errors import ConfigError, DataError
from jaxmoo.kernels.reductions import cross_grams, section_grams, weighted_sum
from jaxmoo.parameters import check_choice
from jaxmoo.sharding import automatic, spec_of, varying

_START = 4096  # columns looked at to tell that a row is not zero


def gram(jacobian: jax.Array) -> jax.Array:
    """Inner products of stacked gradients, accumulated in float32 or, of float64 ones, float64.

    The sum of the Grams of pieces is the Gram of the whole, which is how blocks spread over many
    leaves or devices are formed.

    Args:
      jacobian: ``[K, ...]``, one gradient per objective, any float type.

    Returns:
      ``[K, K]`` float32 or float64, ``G[i, j] = <g_i, g_j>``.

    Example:
      >>> import jax.numpy as jnp
      >>> gram(jnp.array([[3.0, 4.0], [1.0, 0.0]])).tolist()
      [[25.0, 3.0], [3.0, 1.0]]
    """
    return section_grams([jacobian[:, None]])[0][0]


def combine_rows(jacobian: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sum of gradients, in which a weight of exactly 0 removes its row.

    A row of weight 0 is selected away and not multiplied, because ``0 * NaN`` is NaN: a masked
    objective cannot poison the others.

    Args:
      jacobian: ``[K, ...]``, one gradient per objective, any float type.
      weights: ``[K]``.

    Returns:
      ``sum_k weights[k] * jacobian[k]`` of shape ``[...]`` in the gradients' type, accumulated in
      float32 or, of float64 gradients, float64.

    Example:
      >>> import jax.numpy as jnp
      >>> J = jnp.array([[1.0, 2.0], [float("nan"), 5.0]])
      >>> combine_rows(J, jnp.array([0.5, 0.0])).tolist()
      [0.5, 1.0]
    """
    return weighted_sum(jacobian[:, None], jnp.asarray(weights)[None])[0]


def aggregate(
    aggregator: str | Aggregator,
    jacobian: jax.Array,
    *,
    key: jax.Array | None = None,
    active: jax.Array | None = None,
    preference: jax.Array | None = None,
    state: State | None = None,
    second: jax.Array | None = None,
    nonfinite: Literal["skip", "raise"] = "skip",
) -> jax.Array:
    """Resolve one matrix of gradients into one update.

    The whole matrix is a single block, block 0. To keep the state of a method that has one, call
    :func:`weigh_block` and :func:`combine_rows` instead.

    Args:
      aggregator: a method's name, or an aggregator.
      jacobian: ``[K, n]`` float, one gradient per objective.
      key: key of a stochastic method.
      active: ``[K]`` bool, False for an absent objective. None: a zero gradient is absent.
      preference: ``[K]`` importances of the objectives, at least 0, any scale. None: all equal.
      state: the method's state; None starts a new one.
      second: ``[K, n]`` gradients of an independent second batch, for methods that need one.
      nonfinite: what a NaN or infinity in a gradient does. ``"skip"`` leaves that objective out;
        ``"raise"`` raises, which compiled code cannot.

    Returns:
      The update ``[n]``, in the gradients' type.

    Raises:
      ConfigError: if a name, shape or option does not fit.
      DataError: if a gradient is not finite and ``nonfinite="raise"``.

    Example:
      >>> import jax.numpy as jnp
      >>> aggregate("mean", jnp.array([[2.0, 0.0], [0.0, 4.0]])).tolist()
      [1.0, 2.0]
    """
    method = get(aggregator)
    jacobian = jnp.asarray(jacobian)
    if jacobian.ndim != 2 or not jnp.issubdtype(jacobian.dtype, jnp.floating):
        raise ConfigError(
            "aggregate: expected a float matrix [K, n], one gradient per objective; found "
            f"{jacobian.dtype} of shape {jacobian.shape}."
        )
    k = jacobian.shape[0]
    for name, vector in (("active", active), ("preference", preference)):
        if vector is not None and np.shape(vector) != (k,):
            raise ConfigError(
                f"aggregate: expected {name} of shape ({k},), one entry per objective; found "
                f"shape {np.shape(vector)}."
            )
    if preference is not None and not isinstance(preference, Tracer):
        values = np.asarray(preference)
        if not (np.all(np.isfinite(values)) and np.all(values >= 0) and np.any(values > 0)):
            raise ConfigError(
                "aggregate: expected finite preferences >= 0, not all 0; found "
                f"{values.tolist()}. Leave an objective out with active=."
            )
    check_choice("aggregate", "nonfinite", nonfinite, ("skip", "raise"))
    if nonfinite == "raise":
        _refuse_nonfinite(jacobian, active)
    if active is not None:
        active = jnp.asarray(active)
    if method.cross_gram and (second is None or jnp.shape(second) != jacobian.shape):
        raise ConfigError(
            f"aggregate: {method.name} needs the gradients of an independent second batch: "
            f"expected second= of shape {jacobian.shape}, found "
            f"{'None' if second is None else jnp.shape(second)}."
        )
    if method.stochastic and key is None:
        raise missing_key(method)
    return automatic(
        functools.partial(compiled(_aggregate), method),
        (jacobian, second, state, key, active, preference),
        P(*spec_of(jacobian)[1:]),
    )


def _aggregate(method, jacobian, second, state, key, active, preference):
    rest = {"key": key, "active": active, "preference": preference}
    if method.combine is not None:
        return combine_block(method, jacobian, **rest)
    if not method.reads_gram:
        return _in_one_pass(method, jacobian, state, key, active, preference)
    products = cross_gram(jacobian, second) if method.cross_gram else gram(jacobian)
    weights, _ = weigh_block(method, products, state=state, **rest)
    return combine_rows(jacobian, weights)


def _in_one_pass(method, jacobian, state, key, active, preference):
    """The update of a method whose weights depend only on which rows are zero or non-finite.

    Finding out would take a second pass over the gradients. It is hardly ever needed: a non-finite
    row that is heard makes the update non-finite, and a row with a non-zero start is not zero.
    """

    def update(sizes):
        rest = {"state": state, "key": key, "active": active, "preference": preference}
        weights, _ = weigh_block(method, jnp.diag(sizes), **rest)
        return combine_rows(jacobian, weights), weights

    guess, weights = update(jnp.ones(jacobian.shape[0], jacobian.dtype))
    started = jnp.max(jnp.abs(jacobian[:, :_START]), axis=1, initial=0) > 0
    known = (weights != 0) & started
    if active is not None:
        known |= ~active

    def look(_):
        done = varying(jnp.ones((), bool), first)
        return update(largest_entries(jacobian))[0], done

    # A loop of at most one step, because a conditional would copy the update.
    finite = jnp.isfinite(jnp.sum(guess * 0))  # zero times a non-finite number is NaN
    first = (guess, jnp.all(known) & finite)
    return jax.lax.while_loop(lambda carry: ~carry[1], look, varying(first))[0]


def cross_gram(first: jax.Array, second: jax.Array) -> jax.Array:
    """Inner products between the gradients of two batches, accumulated as by :func:`gram`.

    Args:
      first: ``[K, ...]`` gradients of one batch.
      second: ``[K, ...]`` gradients of another, independent one.

    Returns:
      ``[K, K]``, ``<first_i, second_j>``.

    Example:
      >>> import jax.numpy as jnp
      >>> cross_gram(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])).tolist()
      [[11.0]]
    """
    return cross_grams(first[:, None], second[:, None])[0]


def _refuse_nonfinite(jacobian: jax.Array, active: jax.Array | None) -> None:
    if isinstance(jacobian, Tracer):
        raise ConfigError(
            "aggregate: nonfinite='raise' cannot raise from compiled code. Call it outside jit, "
            "or skip and look at the weights: a skipped objective has weight 0."
        )
    bad = ~np.asarray(jnp.isfinite(jacobian).all(axis=1))
    if active is not None:
        bad &= np.asarray(active)
    if bad.any():
        raise DataError(
            f"aggregate: the gradients of objectives {np.flatnonzero(bad).tolist()} are not "
            "finite. Pass nonfinite='skip' to leave them out."
        )
