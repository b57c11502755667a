"""Coordinate-wise and selecting rules: graddrop, trimmed_mean, krum; and plain weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aggregators.families import KEY, LABELS, STACK, K, apply_rule, resolve
from jaxmoo import aggregators
from jaxmoo.aggregators import aggregate, combine_block
from jaxmoo.errors import ConfigError

RULES = {
    "graddrop": aggregators.graddrop(),
    "graddrop leak": aggregators.graddrop(0.3),
    "trimmed_mean": aggregators.trimmed_mean(1),
    "trimmed_mean 2": aggregators.trimmed_mean(2),
}


def apply(name: str, stack: np.ndarray, active: np.ndarray | None = None, dtype=jnp.float32):
    return apply_rule(RULES[name], stack, active, dtype).astype(np.float64)


@pytest.mark.parametrize("name", RULES)
def test_shared_promises(name):
    """Scale convention, one objective, no gradient, linear scaling, failures, bfloat16."""
    updates = apply(name, STACK)
    assert np.isfinite(updates).all()
    for (family, _), update, matrix in zip(LABELS, updates, STACK, strict=True):
        if family == "equal":
            np.testing.assert_allclose(update, matrix[0], rtol=1e-5)
        if family == "single-row":
            np.testing.assert_allclose(update, matrix.sum(0), rtol=1e-6)
        if family == "all-zero":
            assert not update.any()
    for factor in (2.0**-40, 2.0**40):
        np.testing.assert_allclose(apply(name, STACK * factor), updates * factor, rtol=1e-6)
    spoilt, clean = STACK.copy(), STACK.copy()
    spoilt[:, 1, 3], clean[:, 1] = np.nan, 0.0
    active = np.any(clean != 0, axis=2) | (np.arange(K) == 1)
    np.testing.assert_array_equal(apply(name, spoilt, active), apply(name, clean))
    rounded = np.asarray(jnp.asarray(STACK, jnp.bfloat16).astype(jnp.float32), np.float64)
    low, full = apply(name, STACK, dtype=jnp.bfloat16), apply(name, rounded)
    np.testing.assert_allclose(low, full, rtol=2**-8, atol=1e-30)


def test_a_nan_in_a_long_gradient_is_noticed():
    """A maximum of many numbers may pass over it."""
    j = np.random.default_rng(0).standard_normal((4, 20_000)).astype(np.float32)
    spoilt = j.copy()
    spoilt[1, 12_345] = np.nan
    for rule in (aggregators.trimmed_mean(1), aggregators.graddrop(1.0)):
        found = aggregate(rule, jnp.asarray(spoilt), key=KEY)
        expected = aggregate(rule, jnp.asarray(np.delete(j, 1, axis=0)), key=KEY)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("trim", "name"), [(1, "trimmed_mean"), (2, "trimmed_mean 2")])
def test_trimmed_mean_equals_sorting(trim, name):
    updates = apply(name, STACK)
    for i, matrix in enumerate(STACK):
        rows = matrix[np.any(matrix != 0, axis=1)]
        if len(rows) > 2 * trim:
            expected = np.sort(rows, axis=0)[trim : len(rows) - trim].mean(0)
            np.testing.assert_allclose(updates[i], expected, rtol=1e-4, atol=1e-5)


def test_trimmed_mean_of_too_few_is_the_median():
    j = jnp.array([[1.0], [2.0], [9.0]])
    assert aggregate(aggregators.trimmed_mean(5), j).tolist() == [2.0]
    assert aggregate(aggregators.trimmed_mean(1), j[:2]).tolist() == [1.5]


def test_trimmed_mean_weights_what_it_keeps():
    j = jnp.array([[1.0], [2.0], [3.0], [9.0]])
    d = aggregate(aggregators.trimmed_mean(1), j, preference=jnp.array([1.0, 1.0, 3.0, 1.0]))
    assert d.tolist() == [2.75]


def test_graddrop_keeps_one_sign_per_coordinate():
    """With the probability of its share."""
    column = np.array([3.0, 1.0, -2.0, -0.5])
    j = jnp.asarray(np.tile(column[:, None], (1, 20000)), jnp.float32)
    update = np.asarray(aggregate("graddrop", j, key=KEY), np.float64)
    np.testing.assert_allclose(np.unique(update), [-2.5 / 4, 1.0], rtol=1e-6)
    share = 0.5 * (1 + column.sum() / np.abs(column).sum())
    assert (update > 0).mean() == pytest.approx(share, abs=0.01)


def test_graddrop_leaks():
    j = jnp.array([[3.0], [-1.0]])
    update = float(aggregate(aggregators.graddrop(0.5), j, key=KEY)[0])
    assert update in (pytest.approx((3 - 0.5) / 2), pytest.approx((1.5 - 1) / 2))
    everything = aggregate(aggregators.graddrop(1.0), j, key=KEY)
    np.testing.assert_allclose(everything, j.mean(0))


def test_graddrop_leaks_of_every_objective_its_own_share():
    """By the rule written out for one coordinate after another."""
    rng = np.random.default_rng(0)
    j, uniform = rng.standard_normal((K, 50)), rng.uniform(size=50)
    leak = np.linspace(0, 1, K)
    total = np.zeros(50)
    for column in range(50):
        purity = (1 + j[:, column].sum() / np.abs(j[:, column]).sum()) / 2
        winner = 1 if uniform[column] < purity else -1
        for row in range(K):
            kept = np.sign(j[row, column]) == winner
            total[column] += (1 if kept else leak[row]) * j[row, column]
    for given in (leak, leak.tolist(), tuple(leak)):
        found = combine_block(
            aggregators.graddrop(given, reduction="sum"),
            jnp.asarray(j, jnp.float32),
            uniform=jnp.asarray(uniform, jnp.float32),
        )
        np.testing.assert_allclose(found, total, rtol=1e-5, atol=1e-6)


def test_leaks_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"leak to be a number in \[0, 1\], found 1.5"):
        aggregators.graddrop([0.0, 1.5])
    with pytest.raises(ConfigError, match="a leak for each of the 3 objectives"):
        aggregate(aggregators.graddrop([0.0, 1.0]), jnp.ones((3, 2)), key=KEY)


def test_graddrop_sum_is_published():
    j = jnp.array([[2.0, 2.0], [4.0, 0.0]])
    update = aggregate(aggregators.graddrop(reduction="sum"), j, key=KEY)
    np.testing.assert_allclose(update, [6.0, 2.0])


@pytest.mark.parametrize(("name", "byzantine", "selected"), [("krum", 1, 1), ("krum 2", 0, 2)])
def test_krum_equals_its_definition(name, byzantine, selected):
    weights, _ = resolve(name, STACK)
    for i, (family, seed) in enumerate(LABELS):
        if family not in ("random", "correlated", "imbalanced", "zero-row", "low-rank"):
            continue
        rows = np.flatnonzero(np.any(STACK[i] != 0, axis=1))
        j = STACK[i][rows]
        distance = np.square(j[:, None] - j[None]).sum(2)
        near = np.sort(distance, axis=1)[:, 1 : 1 + max(len(rows) - byzantine - 2, 1)]
        chosen = rows[np.argsort(near.sum(1))[:selected]]
        expected = np.zeros(K)
        expected[chosen] = 1 / selected
        np.testing.assert_allclose(weights[i], expected, err_msg=f"{family} {seed}")


def test_krum_withstands_corrupt_rows():
    rng = np.random.default_rng(0)
    honest = rng.standard_normal(8) + 0.1 * rng.standard_normal((5, 8))
    j = jnp.asarray(np.vstack([honest, 1e3 * rng.standard_normal((1, 8))]), jnp.float32)
    d = aggregate(aggregators.krum(n_byzantine=1, n_selected=3), j)
    assert np.linalg.norm(d - honest.mean(0)) < 0.5


def test_constant_weights_of_the_rows():
    weights, _ = resolve("constant", STACK)
    given = np.arange(1.0, K + 1)
    np.testing.assert_allclose(weights[0], given / given.sum(), rtol=1e-6)
    # An absent objective's weight goes to the others in proportion.
    missing = [family for family, _ in LABELS].index("zero-row")
    given[K // 2] = 0
    np.testing.assert_allclose(weights[missing], given / given.sum(), rtol=1e-6)


def test_unit_mean_averages_directions_at_the_mean_length():
    preference = np.arange(1.0, K + 1)
    preference /= preference.sum()
    _, updates = resolve("unit_mean", STACK, preference=preference)
    for (family, _), j, update in zip(LABELS, STACK, updates, strict=True):
        if np.all(np.any(j != 0, axis=1)):
            norms = np.linalg.norm(j, axis=1)
            expected = (preference @ norms) * (preference / norms) @ j
            np.testing.assert_allclose(update, expected, atol=1e-5 * norms.max(), err_msg=family)


def test_random_weights_are_a_softmax_of_normals():
    grams = np.broadcast_to(np.eye(3, dtype=np.float32), (4000, 3, 3))
    draw = jax.jit(lambda g: aggregators.weigh_blocks(aggregators.random(), g, key=KEY)[0])
    weights = draw(grams)
    logits = np.log(np.asarray(weights, np.float64))
    logits -= logits.mean(1, keepdims=True)
    # Three centred standard normals: variance 2/3, covariance -1/3.
    np.testing.assert_allclose(np.cov(logits.T), np.eye(3) - 1 / 3, atol=0.06)
    np.testing.assert_allclose(weights.mean(0), 1 / 3, atol=0.02)
