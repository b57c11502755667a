"""Loss weightings."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmoo import weighting
from jaxmoo.errors import ConfigError

LOSSES = jnp.array([1.0, 2.0, 4.0])
MADE = {
    "static": weighting.static([1.0, 2.0, 3.0]),
    "temperature": weighting.temperature([10, 100, 1000], temperature=5.0),
    "famo": weighting.famo(),
    "uw": weighting.uw(),
    "imtl_l": weighting.imtl_l(),
    "dwa": weighting.dwa(),
}


def run(made, losses, active=None):
    """Weights at every step for losses ``[T, K]``."""

    @jax.jit
    def scan(losses):
        def step(state, now):
            weights, state = made.update(now, state, active)
            return state, weights

        return jax.lax.scan(step, made.init(losses.shape[1]), losses)

    state, weights = scan(jnp.asarray(losses))
    return np.asarray(weights), state


@functools.cache
def compiled(name):
    return jax.jit(MADE[name].update)


def test_every_name_has_a_test_here():
    assert set(MADE) == set(weighting.names())


@pytest.mark.parametrize("name", MADE)
def test_weights_have_mean_one(name):
    """So a learning rate carries over."""
    weights, _ = run(MADE[name], jnp.tile(LOSSES, (5, 1)))
    np.testing.assert_allclose(weights.mean(1), 1, rtol=1e-5)
    assert (weights > 0).all()


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("bad", [None, jnp.nan])
def test_absent_and_failed_losses_are_left_out(name, bad):
    state, update = MADE[name].init(3), compiled(name)
    for _ in range(3):
        _, state = update(LOSSES, state)
    losses = LOSSES if bad is None else LOSSES.at[1].set(bad)
    active = jnp.array([True, False, True]) if bad is None else None
    weights, after = update(losses, state, active)
    assert float(weights[1]) == 0 and float(weights.sum()) == pytest.approx(2, abs=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after)) or name == "dwa"
    weights, _ = update(LOSSES, after)
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("name", MADE)
def test_weights_carry_no_gradient(name):
    made = MADE[name]

    def loss(x):
        weights, _ = made.update(x * LOSSES, made.init(3))
        return jnp.sum(weights)

    assert float(jax.jit(jax.grad(loss))(2.0)) == 0


def test_temperature_flattens():
    sizes = np.array([1.0, 10.0, 100.0])
    for t in (1.0, 2.0, 5.0):
        expected = sizes ** (1 / t)
        found = weighting.temperature(sizes, temperature=t).update(LOSSES, ())[0]
        np.testing.assert_allclose(found, expected / expected.mean(), rtol=1e-5)


def test_dwa_is_the_papers_formula():
    rng = np.random.default_rng(0)
    losses = np.exp(0.3 * rng.standard_normal((8, 3)))
    weights, _ = run(weighting.dwa(2.0, period=2), losses)
    means = losses.reshape(4, 2, 3).mean(1)
    for t, w in enumerate(weights):
        epoch = t // 2
        if epoch < 2:
            np.testing.assert_allclose(w, 1, rtol=1e-5)
        else:
            r = np.exp(means[epoch - 1] / means[epoch - 2] / 2.0)
            np.testing.assert_allclose(w, 3 * r / r.sum(), rtol=1e-5)


def test_famo_is_the_papers_recursion():
    """Softmax Jacobian, decay in Adam's gradient, in float64."""
    rng = np.random.default_rng(0)
    losses = np.exp(0.3 * rng.standard_normal((6, 3)))
    weights, _ = run(weighting.famo(0.05, gamma=0.01), losses)
    logits, m, v = np.zeros(3), np.zeros(3), np.zeros(3)
    for t in range(6):
        if t > 0:
            z = np.exp(logits) / np.exp(logits).sum()
            fall = np.log(losses[t - 1]) - np.log(losses[t])
            g = z * (fall - z @ fall) + 0.01 * logits
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            logits = logits - 0.05 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        z = np.exp(logits) / np.exp(logits).sum()
        expected = z / losses[t]
        np.testing.assert_allclose(weights[t], 3 * expected / expected.sum(), rtol=1e-4)


def test_famo_turns_to_the_loss_that_does_not_fall():
    t = np.arange(50)[:, None]
    falling = np.exp(-0.1 * t * np.array([1.0, 1.0, 0.0]))
    _, state = run(weighting.famo(), falling)
    assert state.logits[2] > state.logits[0]


@pytest.mark.parametrize("make", [weighting.uw, weighting.imtl_l])
def test_learned_weights_tend_to_the_inverse_losses(make):
    weights, _ = run(make(0.05, normalise=False), jnp.tile(LOSSES, (400, 1)))
    np.testing.assert_allclose(weights[-1], 1 / LOSSES, rtol=1e-2)


def test_a_weighted_step_trains():
    """As the package's docstring says: weights of these losses, then the gradient of their mean."""
    scales = jnp.array([1.0, 30.0])
    made, tx = weighting.uw(0.1), optax.sgd(0.02)

    def losses(x):
        return scales * jnp.square(x - jnp.array([1.0, -1.0])) + 0.1

    def step(carry, _):
        x, opt, state = carry
        weights, state = made.update(losses(x), state)
        grad = jax.grad(lambda x: jnp.mean(weights * losses(x)))(x)
        update, opt = tx.update(grad, opt)
        return (optax.apply_updates(x, update), opt, state), None

    x = jnp.zeros(2)
    train = jax.jit(lambda carry: jax.lax.scan(step, carry, length=1000)[0])
    x, _, _ = train((x, tx.init(x), made.init(2)))
    np.testing.assert_allclose(losses(x), 0.1, rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("uvw", {}, "Did you mean 'uw'"),
        ("dwa", {"Temperature": 2.0}, "Did you mean 'temperature'"),
        ("dwa", {"temperature": 0.0}, "expected temperature"),
        ("dwa", {"period": 0}, "expected period"),
        ("static", {}, "missing a required argument"),
        ("static", {"weights": [-1.0, 2.0]}, "not all 0"),
        ("temperature", {"sizes": [0, 0]}, "not all 0"),
    ],
)
def test_mistakes_are_explained(name, options, message):
    with pytest.raises(ConfigError, match=message):
        weighting.get(name, **options)


def test_a_wrong_number_of_objectives_is_refused():
    with pytest.raises(ConfigError, match="3 weights were given for 2 objectives"):
        MADE["static"].init(2)
    assert weighting.get(MADE["famo"]) is MADE["famo"]
