"""PCGrad and GradVac: projections in random orders."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import chdtrc

from aggregators import oracles
from aggregators.families import STACK, families
from jaxmoo import aggregators
from jaxmoo.aggregators.methods.gradvac import vaccinate
from jaxmoo.aggregators.methods.pcgrad import project_conflicts, random_orders
from jaxmoo.aggregators.solvers import equilibrate

CONFLICTING = np.array([[1.0, 0.2, -0.5, 0.0], [-0.9, 1.0, 0.3, 0.1], [0.1, -0.8, -0.7, 2.0]])


def coefficients_of(j: np.ndarray):
    gram = jnp.asarray(j @ j.T, jnp.float32)
    return equilibrate(gram, jnp.ones(len(j), bool))


def test_all_orders_of_three_objectives():
    """All 6^3 triples of orders, as projections of the vectors themselves."""
    orders = list(itertools.permutations(range(3)))
    triples = list(itertools.product(orders, repeat=3))
    run = jax.jit(jax.vmap(project_conflicts, in_axes=(None, 0)))
    for j in (CONFLICTING, families(3, 5)["imbalanced low-rank"], families(3, 7)["random"]):
        cosine, norm = coefficients_of(j)
        coefficients = np.asarray(run(cosine, jnp.asarray(triples)), np.float64)
        norm = np.asarray(norm, np.float64)
        weights = np.einsum("i,tij,j->tj", norm, coefficients, 1 / norm) / 3
        expected = np.stack([oracles.pcgrad(j, triple) for triple in triples])
        assert len(np.unique(np.round(expected, 6), axis=0)) > 1  # the order matters
        np.testing.assert_allclose(
            weights @ j, expected, atol=2e-6 * np.abs(weights).max() * norm.max()
        )


def p_of_uniform(counts: np.ndarray) -> float:
    """The p-value of Pearson's test that all are equally likely."""
    expected = counts.mean()
    return chdtrc(len(counts) - 1, np.sum((counts - expected) ** 2) / expected)


def test_drawn_orders_are_uniform_and_independent():
    draws = np.asarray(
        jax.vmap(lambda k: random_orders(k, 3))(jax.random.split(jax.random.key(0), 6000))
    )
    assert (np.sort(draws, axis=2) == np.arange(3)).all()
    codes = draws @ np.array([9, 3, 1])
    for row in range(3):
        _, counts = np.unique(codes[:, row], return_counts=True)
        assert len(counts) == 6 and p_of_uniform(counts) > 1e-3
    _, counts = np.unique(codes[:, 0] * 27 + codes[:, 1], return_counts=True)
    assert len(counts) == 36 and p_of_uniform(counts) > 1e-3


def test_the_method_draws_new_orders_with_every_key_and_block():
    gram = aggregators.gram(jnp.asarray(CONFLICTING, jnp.float32))
    method = aggregators.pcgrad()
    orders = list(itertools.permutations(range(3)))
    possible = [oracles.pcgrad(CONFLICTING, t) for t in itertools.product(orders, repeat=3)]
    draw = jax.jit(jax.vmap(lambda k: aggregators.weigh_block(method, gram, key=k)[0]))(
        jax.random.split(jax.random.key(1), 400)
    )
    updates = np.asarray(draw, np.float64) @ CONFLICTING
    distance = np.linalg.norm(updates[:, None] - np.asarray(possible)[None], axis=2).min(1)
    assert distance.max() < 1e-5
    # Every outcome that some orders give is drawn.
    assert len(np.unique(np.round(updates, 4), axis=0)) == len(
        np.unique(np.round(possible, 4), axis=0)
    )


def test_without_conflict_it_is_the_mean_or_the_sum():
    j = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    key = jax.random.key(0)
    np.testing.assert_allclose(aggregators.aggregate("pcgrad", j, key=key), j.mean(0))
    summed = aggregators.pcgrad(reduction="sum")
    np.testing.assert_allclose(aggregators.aggregate(summed, j, key=key), j.sum(0))


def test_opposed_gradients_vanish():
    j = jnp.array([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]])
    update = aggregators.aggregate("pcgrad", j, key=jax.random.key(0))
    np.testing.assert_allclose(update, 0, atol=1e-6)


def test_gradvac_equals_the_papers_rule_over_several_steps():
    """Targets and moved gradients, for given orders, on the vectors themselves."""
    run = jax.jit(vaccinate)
    rng = np.random.default_rng(0)
    expected_targets = np.zeros((3, 3))
    targets = jnp.zeros((3, 3))
    for _ in range(6):
        j = CONFLICTING + 0.3 * rng.standard_normal(CONFLICTING.shape)
        orders = np.stack([rng.permutation(3) for _ in range(3)])
        expected, expected_targets = oracles.gradvac(j, orders, expected_targets, 0.3)
        cosine, norm = coefficients_of(j)
        coefficients, targets = run(cosine, orders, jnp.ones(3, bool), targets, 0.3)
        update = np.asarray(norm) @ np.asarray(coefficients) / np.asarray(norm) @ j / 3
        np.testing.assert_allclose(update, expected, atol=1e-5)
        np.testing.assert_allclose(targets, expected_targets, atol=1e-5)


def test_gradvac_starts_as_pcgrad():
    j = jnp.asarray(STACK[0, :2], jnp.float32) * jnp.array([[1.0], [-1.0]])
    key = jax.random.key(0)
    np.testing.assert_allclose(
        aggregators.aggregate("gradvac", j, key=key),
        aggregators.aggregate("pcgrad", j, key=key),
        rtol=1e-5,
    )


def test_gradvac_is_stable_for_gradients_that_stay_parallel():
    """Their target cosine tends to 1, where the rule divides by zero."""
    method = aggregators.gradvac(0.5)
    j = jnp.asarray(np.outer([1.0, 2.0, 5.0], STACK[0, 0]), jnp.float32)
    gram = aggregators.gram(j)

    def step(state, key):
        weights, state = aggregators.weigh_block(method, gram, state=state, key=key)
        return state, weights

    _, weights = jax.lax.scan(step, method.init(3), jax.random.split(jax.random.key(0), 60))
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-4)


def test_gradvac_keeps_the_targets_of_absent_objectives():
    gram = aggregators.gram(jnp.asarray(CONFLICTING, jnp.float32))
    before = jnp.full((3, 3), 0.25)
    _, after = aggregators.weigh_block(
        aggregators.gradvac(),
        gram,
        state=before,
        key=jax.random.key(0),
        active=jnp.array([True, True, False]),
    )
    changed = np.asarray(after != before)
    assert changed[0, 1] and changed[1, 0]
    assert not changed[2].any() and not changed[:, 2].any() and not np.diagonal(changed).any()
