"""What every aggregator keeps, over all families of matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aggregators.families import (
    KEY,
    LABELS,
    NAMES,
    STACK,
    VARIANTS,
    K,
    assert_scaling_is_exact,
    combine,
    compiled,
    filled,
    mean_size,
    resolve,
    rotation_errors,
    size,
)
from jaxmoo import aggregators

WEIGHED = tuple(name for name, method in VARIANTS.items() if method.combine is None)
FIXED = tuple(name for name in WEIGHED if not VARIANTS[name].stochastic)
PUBLISHED = ("fairgrad published", "nash_mtl published")
UNIT = tuple(
    name
    for name in WEIGHED
    if (VARIANTS[name].unit_scale and not VARIANTS[name].summed) or name == "constant"
)

# What the papers promise of a single step.
NON_CONFLICTING = (
    "mgda",
    "mgda l2",
    "upgrad",
    "dualproj",
    "nash_mtl",
    "nash_mtl published",
    "fairgrad",
    "fairgrad 2",
    "fairgrad 0.5",
    "fairgrad published",
)
# The same, while the gradients are linearly independent.
NON_CONFLICTING_IF_INDEPENDENT = ("imtl_g", "config", "config sum")
DEPENDENT = ("low-rank", "imbalanced low-rank", "opposed", "all-zero")
CONVEX = (
    "mean",
    "random",
    "excess_mtl",
    "mgda",
    "mgda l2",
    "moco",
    "modo",
    "sdmgrad",
    "krum",
    "krum 2",
)

# Rounding of an update formed from float32 weights, relative to the sum of its terms.
ROUNDING = 2e-6


def projections(updates: np.ndarray, stack: np.ndarray) -> np.ndarray:
    """``<g_i, d> / |g_i|``, ``[M, K]``, 0 for zero rows."""
    norms = np.linalg.norm(stack, axis=2)
    return np.einsum("mkn,mn->mk", stack, updates) / np.where(norms > 0, norms, 1.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", WEIGHED)
def test_weights_are_finite_and_ignore_absent_objectives(name, dtype):
    weights, _ = resolve(name, STACK, dtype=dtype)
    assert np.isfinite(weights).all()
    assert (weights[~np.any(STACK != 0, axis=2)] == 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", NON_CONFLICTING + NON_CONFLICTING_IF_INDEPENDENT)
def test_no_objective_is_opposed(name, dtype):
    stack = np.asarray(jnp.asarray(STACK, dtype).astype(jnp.float32), np.float64)
    weights, updates = resolve(name, STACK, dtype=dtype)
    worst = projections(updates, stack).min(1) / (size(weights, stack) + mean_size(stack))
    for (family, seed), value in zip(LABELS, worst, strict=True):
        if name in NON_CONFLICTING_IF_INDEPENDENT and family in DEPENDENT:
            continue
        assert value >= -ROUNDING, (family, seed)


@pytest.mark.parametrize("name", CONVEX)
def test_weights_are_a_convex_combination(name):
    weights, _ = resolve(name, STACK)
    present = np.any(STACK != 0, axis=(1, 2))
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights[present].sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", FIXED)
def test_objectives_may_be_permuted(name):
    if name == "constant":  # its weights belong to positions
        return
    order = np.random.default_rng(3).permutation(K)
    weights, updates = resolve(name, STACK)
    permuted, again = resolve(name, STACK[:, order])
    scale = size(weights, STACK) + mean_size(STACK)
    error = np.linalg.norm(updates - again, axis=1) / scale
    for (family, seed), value in zip(LABELS, error, strict=True):
        if name.startswith("krum") and family in ("duplicates", "opposed", "equal"):
            continue  # ties go to the first
        assert value <= 10 * ROUNDING, (family, seed)
    independent = [i for i, (family, _) in enumerate(LABELS) if family in ("random", "imbalanced")]
    np.testing.assert_allclose(
        permuted[independent], weights[independent][:, order], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", WEIGHED)
def test_columns_may_be_rotated(name):
    """Only inner products matter: the same weights for J Q, Q orthogonal."""
    for (family, seed), value in zip(LABELS, rotation_errors(resolve, name), strict=True):
        # Rounding J Q to float32 moves gradients that cancel or coincide apart, where the solution
        # may jump (aligned_mtl's rank) or a tie be decided otherwise (krum).
        if family in ("opposed", "nearly opposed", "duplicates", "equal", *DEPENDENT):
            continue
        assert value <= 5e-5, (family, seed)


@pytest.mark.parametrize("exponent", [-40, 40])
@pytest.mark.parametrize("name", WEIGHED)
def test_scaling_by_a_power_of_two_is_exact(name, exponent):
    """2^-40 to 2^40 is 1e-12 to 1e12. No threshold is absolute, not even by rounding."""
    assert_scaling_is_exact(resolve, name, exponent, rounding=1e-5)


@pytest.mark.parametrize("name", WEIGHED)
def test_scaling_is_linear(name):
    well_conditioned = [
        i
        for i, (family, _) in enumerate(LABELS)
        if family in ("random", "correlated", "imbalanced", "single-row")
    ]
    stack = STACK[well_conditioned]
    full = np.resize(stack, STACK.shape)
    weights, _ = resolve(name, full)
    for factor in (1e-12, 0.3, 1e12):
        scaled, _ = resolve(name, full * factor)
        expected = weights * factor ** (2 * float(VARIANTS[name].gram_degree))
        np.testing.assert_allclose(scaled, expected, rtol=2e-4, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", UNIT)
def test_equal_gradients_are_returned(name):
    """The scale convention: a learning rate tuned for ordinary training carries over."""
    _, updates = resolve(name, STACK)
    for (family, _), update, matrix in zip(LABELS, updates, STACK, strict=True):
        if family == "equal":
            np.testing.assert_allclose(update, matrix[0], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", UNIT)
def test_preferences_are_relative_and_keep_the_scale(name):
    weights, _ = resolve(name, STACK)
    equal, _ = resolve(name, STACK, preference=np.full(K, 4.0))
    np.testing.assert_array_equal(weights, equal)
    _, updates = resolve(name, STACK, preference=np.arange(1.0, K + 1))
    assert np.isfinite(updates).all()
    for (family, _), update, matrix in zip(LABELS, updates, STACK, strict=True):
        if family == "equal":
            np.testing.assert_allclose(update, matrix[0], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in WEIGHED if n not in PUBLISHED])
def test_a_single_objective_is_returned(name):
    _, updates = resolve(name, STACK)
    for (family, _), update, matrix in zip(LABELS, updates, STACK, strict=True):
        if family == "single-row":
            np.testing.assert_array_equal(update, matrix.sum(0))


@pytest.mark.parametrize("name", WEIGHED)
def test_a_block_without_gradient_stays_still(name):
    weights, _ = resolve(name, STACK)
    assert (weights[[family == "all-zero" for family, _ in LABELS]] == 0).all()


@pytest.mark.parametrize("name", WEIGHED)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_an_absent_or_failed_objective_does_not_matter(name, garbage):
    """Its values are never read, and its weight is exactly 0."""
    out = 2
    clean, spoilt = STACK.copy(), STACK.copy()
    clean[:, out] = 0.0
    spoilt[:, out] = garbage
    active = np.any(clean != 0, axis=2)
    weights, _ = resolve(name, clean)
    again, _ = resolve(name, spoilt, active=active)
    np.testing.assert_array_equal(weights, again)
    if not np.isfinite(garbage):  # found without being told, here in a single coordinate
        spoilt = STACK.copy()
        spoilt[:, out, 5] = garbage
        again, _ = resolve(name, spoilt, active=np.any(clean != 0, axis=2) | (np.arange(K) == out))
        np.testing.assert_array_equal(weights, again)
        updates = combine(jnp.asarray(spoilt, jnp.float32), jnp.asarray(again, jnp.float32))
        assert np.isfinite(updates).all()


@pytest.mark.parametrize("name", WEIGHED)
def test_the_second_call_compiles_nothing(name):
    resolve(name, STACK)
    resolve(name, STACK[::-1])
    assert compiled(VARIANTS[name], "float32")._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mgda", "cagrad", "upgrad", "fairgrad", "gradvac", "random"])
def test_a_batch_of_blocks_equals_one_at_a_time(name):
    """And one block is the whole-model method: block 0 of ``aggregate``."""
    method = VARIANTS[name]

    @jax.jit
    def one(gram, active, block):
        weights, _ = aggregators.weigh_block(method, gram, active=active, block=block, key=KEY)
        return weights

    weights, updates = resolve(name, STACK)
    products = np.einsum("mkn,mln->mkl", STACK, STACK).astype(np.float32)
    for block in range(len(NAMES)):
        matrix = STACK[block]
        gram, active = products[block], np.any(matrix != 0, 1)
        if name == "gradvac":  # draws as many orders as there are rows
            gram, active = filled(gram), np.pad(active, (0, len(filled(gram)) - K))
        w = one(gram, active, block)[:K]
        d = np.asarray(w, np.float64) @ matrix
        scale = size(weights, STACK)[block] + mean_size(STACK)[block]
        assert np.linalg.norm(d - updates[block]) <= ROUNDING * scale, NAMES[block]


@pytest.mark.parametrize("name", WEIGHED)
def test_bfloat16_goes_in_and_comes_out(name):
    stack = jnp.asarray(STACK, jnp.bfloat16)
    weights, expected = resolve(name, STACK, dtype=jnp.bfloat16)
    updates = combine(stack, jnp.asarray(weights, jnp.float32))
    assert updates.dtype == jnp.bfloat16
    terms = size(weights, STACK)[:, None]
    error = np.abs(np.asarray(updates.astype(jnp.float32), np.float64) - expected)
    assert (error <= 2**-8 * np.abs(expected) + 1e-6 * terms).all()


@pytest.mark.parametrize("name", ["mean", "upgrad", "sdmgrad"])
def test_bfloat16_goes_through_aggregate(name):
    j = jnp.asarray(STACK[0], jnp.bfloat16)
    update = jax.jit(lambda j: aggregators.aggregate(VARIANTS[name], j, second=j, key=KEY))(j)
    assert update.dtype == jnp.bfloat16
    _, expected = resolve(name, STACK, dtype=jnp.bfloat16)  # block 0, from float32 weights
    np.testing.assert_allclose(update.astype(jnp.float32), expected[0], rtol=2**-8, atol=1e-5)
