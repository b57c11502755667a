"""Methods that remember: cr_mogm, moco, modo, sdmgrad and the gradient tracker."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

from aggregators.families import STACK, quick_jit
from jaxmoo import aggregators
from jaxmoo.aggregators import cross_gram, gram, weigh_block
from jaxmoo.errors import ConfigError

J = np.asarray(STACK[0, :3], np.float64)
GRAM = gram(jnp.asarray(J, jnp.float32))


def run(method, products, steps, active=None):
    """Weights of every step, with the state carried."""

    @quick_jit
    def scan(products):
        def step(state, _):
            weights, state = weigh_block(method, products, state=state, active=active)
            return state, weights

        return jax.lax.scan(step, method.init(products.shape[0]), length=steps)

    state, weights = scan(products)
    return np.asarray(weights, np.float64), state


EVERYONE = jnp.ones(3, bool)


def weigh(method, gram, state, active=EVERYONE):
    return weigh_block(method, gram, state=state, active=active)


def test_cr_mogm_is_a_debiased_running_mean():
    """The first step is that of the method itself."""
    method = aggregators.cr_mogm("mgda", momentum=0.5)
    grams = [gram(jnp.asarray(J * np.array([[s], [1], [1]]), jnp.float32)) for s in (1, 2, 0.5, 3)]
    state = method.init(3)
    singles = []
    for t, g in enumerate(grams, start=1):
        weights, state = weigh(method, g, state)
        singles.append(np.asarray(weigh(aggregators.mgda(), g, ())[0]))
        past = 0.5 ** np.arange(t)[::-1]
        expected = (past / past.sum()) @ np.stack(singles)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_cr_mogm_starts_from_given_weights():
    """``w_1 = m w_0 + (1 - m) w(G_1)``, as published."""
    initial = np.array([0.7, 0.2, 0.1])
    method = aggregators.cr_mogm("mgda", momentum=0.8, initial=initial)
    expected, single = initial, np.asarray(weigh(aggregators.mgda(), GRAM, ())[0])
    weights, _ = run(method, GRAM, 3)
    for found in weights:
        expected = 0.8 * expected + 0.2 * single
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_initial_weights_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="expected initial weights >= 0"):
        aggregators.cr_mogm("mgda", initial=[1.0, -1.0])
    with pytest.raises(ConfigError, match="given 2 initial weights, but there are 3 objectives"):
        weigh_block(aggregators.cr_mogm("mgda", initial=[0.5, 0.5]), GRAM)


def test_cr_mogm_without_momentum_is_the_method_itself():
    weights, _ = run(aggregators.cr_mogm("mgda", momentum=0.0), GRAM, 3)
    np.testing.assert_allclose(weights[2], weigh(aggregators.mgda(), GRAM, ())[0], rtol=1e-5)


def test_cr_mogm_of_an_absent_objective():
    method = aggregators.cr_mogm("mgda", momentum=0.5)
    _, state = weigh(method, GRAM, method.init(3))
    weights, after = weigh(method, GRAM, state, jnp.array([True, True, False]))
    assert float(weights[2]) == 0 and float(weights.sum()) == pytest.approx(1, abs=1e-5)
    assert float(after.average[2]) == float(state.average[2])


@pytest.mark.parametrize(("eta", "warmup"), [(1.0, 1), (0.5, 3)])
def test_excess_mtl_is_the_papers_recursion(eta, warmup):
    """With one curvature per objective: on numbers of its own, at any scale of the gradients."""
    rng = np.random.default_rng(0)
    lengths = 10 ** rng.uniform(-0.3, 0.3, (7, 3))
    method = aggregators.excess_mtl(eta=eta, warmup=warmup)
    for scale in (1.0, 3e-6):
        state, squares, risks, w = method.init(3), np.zeros(3), [], np.full(3, 1 / 3)
        for length in lengths * scale:
            squares = squares + length**2
            risks.append(length**2 / squares**0.5)
            if len(risks) > warmup:
                w = w * np.exp(eta * risks[-1] / np.mean(risks[:warmup], axis=0))
                w = w / w.sum()
            found, state = weigh(method, gram(jnp.diag(jnp.asarray(length, jnp.float32))), state)
            np.testing.assert_allclose(found, w, rtol=1e-4, atol=1e-6)


def test_excess_mtl_never_loses_an_objective():
    """Its weight may become too small for a number; when its turn comes it grows again."""
    method, state = aggregators.excess_mtl(eta=50.0), None
    for length in [(1.0, 1.0, 1.0)] + [(1.0, 0.01, 0.01)] * 5 + [(0.001, 1.0, 0.001)] * 40:
        lengths = jnp.diag(jnp.asarray(length, jnp.float32))
        weights, state = weigh_block(method, gram(lengths), state=state, active=EVERYONE)
    assert np.isfinite(weights).all() and float(weights[1]) > 0.9


@pytest.mark.parametrize(
    "method", [aggregators.moco(gamma=0.5), aggregators.modo(gamma=0.5)], ids=lambda m: m.name
)
def test_tracked_weights_converge_to_mgda(method):
    weights, _ = run(method, GRAM, 400)
    mgda = weigh(aggregators.mgda(), GRAM, ())[0]
    np.testing.assert_allclose(weights[-1], mgda, atol=2e-3)
    assert np.abs(weights[0] - 1 / 3).max() < np.abs(weights[-1] - 1 / 3).max()  # one small step


def test_regularisation_pulls_tracked_weights_together():
    spread = [
        np.ptp(run(aggregators.moco(gamma=0.2, rho=rho), GRAM, 300)[0][-1]) for rho in (0.0, 4.0)
    ]
    assert spread[1] < 0.3 * spread[0]


def test_sdmgrad_solves_its_regularised_problem():
    g, p, lam = J @ J.T, np.full(3, 1 / 3), 0.3
    weights, _ = run(aggregators.sdmgrad(lam, gamma=0.5), GRAM, 100)
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
    for expected_steps in range(3):  # the weights are kept from one to the next, the speed is not
        velocity = 0
        for _ in range(4):
            velocity = 0.5 * velocity + products @ (w + lam * p)
            w = project_on_simplex(w - 0.2 * velocity)
        method = aggregators.sdmgrad(lam, gamma=0.2, iterations=4, momentum=0.5)
        weights, _ = run(method, GRAM, expected_steps + 1)
        np.testing.assert_allclose(weights[-1], (w + lam * p) / (1 + lam), rtol=1e-4)


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
    cross = jax.vmap(cross_gram)(
        jnp.asarray(noisy[:, 0], jnp.float32), jnp.asarray(noisy[:, 1], jnp.float32)
    ).mean(0)
    same = jax.vmap(gram)(jnp.asarray(noisy[:, 0], jnp.float32)).mean(0)
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

    @quick_jit
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
