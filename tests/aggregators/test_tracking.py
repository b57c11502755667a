"""Methods that remember: cr_mogm, moco, modo, sdmgrad and the gradient tracker."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

from aggregators import oracles
from aggregators.families import STACK
from jaxmoo import aggregators
from jaxmoo.aggregators import cross_gram, gram, weigh_block
from jaxmoo.errors import ConfigError

J = np.asarray(STACK[0, :3], np.float64)
GRAM = gram(jnp.asarray(J, jnp.float32))


@functools.cache
def program(make):
    """Compiled: parameters, Gram matrices [T, 3, 3], who is there [T, 3]; to every step's results.

    The parameters are data, so that a method is compiled once for all of its tests.
    """

    @jax.jit
    def scan(parameters, products, active):
        method = make(**parameters)

        def step(state, now):
            products, active = now
            weights, state = weigh_block(method, products, state=state, active=active)
            return state, (weights, state)

        return jax.lax.scan(step, method.init(3), (products, active))[1]

    return scan


def run(make, parameters, products, active=None):
    """Weights [T, 3] and states of every step of a method that is made of parameters."""
    active = np.ones(products.shape[:2], bool) if active is None else active
    weights, states = program(make)(parameters, jnp.asarray(products, jnp.float32), active)
    return np.asarray(weights, np.float64), states


def again(steps):
    return np.broadcast_to(GRAM, (steps, 3, 3))


EVERYONE = jnp.ones(3, bool)
MGDA = oracles.min_norm(J)


def weigh(method, gram, state, active=EVERYONE):
    return weigh_block(method, gram, state=state, active=active)


smoothed = functools.partial(aggregators.cr_mogm, "mgda")


def test_cr_mogm_is_a_debiased_running_mean():
    """The first step is that of the method itself."""
    matrices = [J * np.array([[s], [1], [1]]) for s in (1, 2, 0.5, 3)]
    found, _ = run(smoothed, {"momentum": 0.5}, np.stack([j @ j.T for j in matrices]))
    singles = np.stack([oracles.min_norm(j) for j in matrices])
    for t, weights in enumerate(found, start=1):
        past = 0.5 ** np.arange(t)[::-1]
        np.testing.assert_allclose(weights, past / past.sum() @ singles[:t], rtol=1e-5)


def test_cr_mogm_without_momentum_is_the_method_itself():
    weights, _ = run(smoothed, {"momentum": 0.0}, again(4))
    np.testing.assert_allclose(weights[3], MGDA, rtol=1e-5)


def test_cr_mogm_of_an_absent_objective():
    active = np.ones((4, 3), bool)
    active[1:, 2] = False
    weights, states = run(smoothed, {"momentum": 0.5}, again(4), active)
    assert weights[1, 2] == 0 and weights[1].sum() == pytest.approx(1, abs=1e-5)
    assert states.average[1, 2] == states.average[0, 2]


def test_cr_mogm_starts_from_given_weights():
    """``w_1 = m w_0 + (1 - m) w(G_1)``, as published."""
    expected = initial = np.array([0.7, 0.2, 0.1])
    make = functools.partial(aggregators.cr_mogm, "mgda", initial=initial)
    weights, _ = run(make, {"momentum": 0.8}, again(3))
    for found in weights:
        expected = 0.8 * expected + 0.2 * MGDA
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_initial_weights_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="expected initial weights >= 0"):
        aggregators.cr_mogm("mgda", initial=[1.0, -1.0])
    with pytest.raises(ConfigError, match="given 2 initial weights, but there are 3 objectives"):
        weigh_block(aggregators.cr_mogm("mgda", initial=[0.5, 0.5]), GRAM)


@pytest.mark.parametrize(("eta", "warmup"), [(1.0, 1), (0.5, 3)])
def test_excess_mtl_is_the_papers_recursion(eta, warmup):
    """With one curvature per objective: on numbers of its own, at any scale of the gradients."""
    rng = np.random.default_rng(0)
    lengths = 10 ** rng.uniform(-0.3, 0.3, (7, 3))
    make = functools.partial(aggregators.excess_mtl, warmup=warmup)
    for scale in (1.0, 3e-6):
        squares, risks, w = np.zeros(3), [], np.full(3, 1 / 3)
        weights, _ = run(make, {"eta": eta}, np.square(lengths * scale)[:, :, None] * np.eye(3))
        for length, found in zip(lengths * scale, weights, strict=True):
            squares = squares + length**2
            risks.append(length**2 / squares**0.5)
            if len(risks) > warmup:
                w = w * np.exp(eta * risks[-1] / np.mean(risks[:warmup], axis=0))
                w = w / w.sum()
            np.testing.assert_allclose(found, w, rtol=1e-4, atol=1e-6)


def test_excess_mtl_never_loses_an_objective():
    """Its weight may become too small for a number; when its turn comes it grows again."""
    lengths = [(1.0, 1.0, 1.0)] + [(1.0, 0.01, 0.01)] * 5 + [(0.001, 1.0, 0.001)] * 40
    products = np.square(lengths)[:, :, None] * np.eye(3)
    weights, _ = run(aggregators.excess_mtl, {"eta": 50.0}, products)
    assert np.isfinite(weights).all() and weights[-1, 1] > 0.9


@pytest.mark.parametrize(
    ("make", "parameters"),
    [(aggregators.moco, {"gamma": 0.5, "rho": 0.0}), (aggregators.modo, {"gamma": 0.5})],
)
def test_tracked_weights_converge_to_mgda(make, parameters):
    weights, _ = run(make, parameters, again(400))
    np.testing.assert_allclose(weights[-1], MGDA, atol=2e-3)
    assert np.abs(weights[0] - 1 / 3).max() < np.abs(weights[-1] - 1 / 3).max()  # one small step


def test_regularisation_pulls_tracked_weights_together():
    spread = [
        np.ptp(run(aggregators.moco, {"gamma": 0.2, "rho": rho}, again(400))[0][300])
        for rho in (0.0, 4.0)
    ]
    assert spread[1] < 0.3 * spread[0]


def test_sdmgrad_solves_its_regularised_problem():
    g, p, lam = J @ J.T, np.full(3, 1 / 3), 0.3
    weights, _ = run(aggregators.sdmgrad, {"lambda_": lam, "gamma": 0.5}, again(100))
    exact = minimize(
        lambda w: (w + lam * p) @ g @ (w + lam * p),
        p,
        bounds=[(0, 1)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14},
    ).x
    np.testing.assert_allclose(weights[-1], (exact + lam * p) / (1 + lam), atol=1e-3)


def test_sdmgrad_has_momentum_within_a_step():
    """By the recursion on the products themselves."""
    products, lam, p = J @ J.T, 0.3, np.full(3, 1 / 3)
    products = products / np.abs(products).max()
    w = p
    make = functools.partial(aggregators.sdmgrad, gamma=0.2, iterations=4, momentum=0.5)
    weights, _ = run(make, {"lambda_": lam}, again(3))
    for found in weights:  # the weights are kept from one to the next, the speed is not
        velocity = 0
        for _ in range(4):
            velocity = 0.5 * velocity + products @ (w + lam * p)
            w = project_on_simplex(w - 0.2 * velocity)
        np.testing.assert_allclose(found, (w + lam * p) / (1 + lam), rtol=1e-4)


def project_on_simplex(v: np.ndarray) -> np.ndarray:
    """By bisection on the amount taken from every coordinate."""
    low, high = v.min() - 1, v.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(v - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(v - low, 0)


def test_two_batches_remove_the_noise_of_the_products():
    """``J1 J2^T`` is the Gram matrix of the mean gradients in expectation, ``J1 J1^T`` is not."""
    rng = np.random.default_rng(0)
    noisy = J + rng.standard_normal((2000, 2, *J.shape))

    @jax.jit
    def products(one, other):
        return jax.vmap(cross_gram)(one, other).mean(0), jax.vmap(gram)(one).mean(0)

    one, other = jnp.asarray(noisy.swapaxes(0, 1), jnp.float32)
    cross, same = products(one, other)
    exact = J @ J.T
    assert np.abs(np.diagonal(cross - exact)).max() < 1
    assert np.diagonal(same - exact).min() > 10


def test_a_cross_gram_may_have_any_signs():
    rng = np.random.default_rng(1)
    products = jnp.asarray(rng.standard_normal((3, 3)) * 1e-8, jnp.float32)
    for name in ("modo", "sdmgrad"):
        weights, _ = weigh_block(aggregators.get(name), products)
        assert np.isfinite(weights).all() and (np.asarray(weights) >= 0).all()
        assert float(weights.sum()) == pytest.approx(1, abs=1e-5)


def test_absent_objectives_keep_their_tracked_weight():
    for name in ("moco", "modo", "sdmgrad"):
        method = aggregators.get(name, gamma=0.5)
        _, state = weigh(method, GRAM, method.init(3))
        weights, after = weigh(method, GRAM, state, jnp.array([True, False, True]))
        assert float(after[1]) == float(state[1]) and float(weights[1]) == 0
        assert float(after.sum()) == pytest.approx(1, abs=1e-5)


def test_tracker_is_the_papers_recursion():
    tx = aggregators.track_gradients(2, beta=0.6, decay=0.5)
    state = tx.init({"w": jnp.zeros(3)})
    rng = np.random.default_rng(0)
    y = None
    for t in range(1, 6):
        g = rng.standard_normal((2, 3))
        y = g if y is None else y - 0.6 / t**0.5 * (y - g)
        updates, state = tx.update({"w": jnp.asarray(g, jnp.float32)}, state)
        np.testing.assert_allclose(updates["w"], y, rtol=1e-5)


def test_tracker_survives_a_failed_batch():
    tx = aggregators.track_gradients(2)
    state = tx.init({"w": jnp.zeros(1)})
    _, state = tx.update({"w": jnp.ones((2, 1))}, state)
    updates, state = tx.update({"w": jnp.array([[jnp.nan], [3.0]])}, state)
    np.testing.assert_allclose(updates["w"], [[1.0], [1 + 0.5 / 2**0.5 * 2]], rtol=1e-6)


def test_tracker_and_moco_work_in_a_chain():
    """MoCo as its parts: tracked gradients, tracked weights, any optimiser."""
    import jaxmoo

    targets = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    params = {"w": jnp.array([3.0, 3.0])}
    tx = optax.chain(
        aggregators.track_gradients(2, decay=0.0),
        jaxmoo.resolve_conflicts("moco", blocks="leaf", num_objectives=2),
        optax.sgd(0.2),
    )

    def loss(params, target):
        return jnp.sum((params["w"] - target) ** 2)

    @jax.jit
    def step(params, state):
        _, grads = jaxmoo.stacked_value_and_grad(loss)(params, targets)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(60):
        params, state = step(params, state)
    np.testing.assert_allclose(params["w"], [0.5, 0.5], atol=0.02)


@pytest.mark.parametrize(
    "make",
    [
        lambda: aggregators.track_gradients(0),
        lambda: aggregators.track_gradients(2, beta=2.0),
        lambda: aggregators.moco(gamma=-1.0),
        lambda: aggregators.sdmgrad(-0.1),
        lambda: aggregators.sdmgrad(iterations=0),
        lambda: aggregators.sdmgrad(momentum=1.0),
    ],
)
def test_bad_parameters_are_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()
