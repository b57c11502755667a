"""Per-objective gradients: each objective's own, whatever else is in the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoo import stacked_value_and_grad
from jaxmoo.errors import ConfigError, DataError


def loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"])
    return jnp.mean((hidden @ params["v"] - batch["y"]) ** 2)


@pytest.fixture(scope="module")
def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"w": jax.random.normal(keys[0], (3, 5)), "v": jax.random.normal(keys[1], (5,))}
    batch = {"x": jax.random.normal(keys[2], (4, 7, 3)), "y": jax.random.normal(keys[3], (4, 7))}
    return params, batch


def test_each_row_is_the_gradient_of_that_objective_alone(problem):
    params, batch = problem
    losses, gradients = jax.jit(stacked_value_and_grad(loss))(params, batch)
    for k in range(4):
        one = jax.tree.map(lambda x, k=k: x[k], batch)
        value, gradient = jax.value_and_grad(loss)(params, one)
        assert losses[k] == pytest.approx(float(value), rel=1e-6)
        for name in params:
            np.testing.assert_allclose(gradients[name][k], gradient[name], rtol=1e-5, atol=1e-6)


def test_auxiliary_data_is_returned_per_objective(problem):
    params, batch = problem
    fn = stacked_value_and_grad(lambda p, b: (loss(p, b), b["y"].sum()), has_aux=True)
    (losses, sums), _ = fn(params, batch)
    assert losses.shape == (4,)
    np.testing.assert_allclose(sums, batch["y"].sum(1), rtol=1e-6)


def test_further_arguments_are_shared_or_have_a_value_per_objective(problem):
    params, batch = problem

    def scaled(p, b, factor, name, *, power):
        return loss(p, b) * factor**power if name == "scaled" else loss(p, b)

    factors = jnp.arange(1.0, 5.0)
    losses, gradients = stacked_value_and_grad(scaled, in_axes=(0, None))(
        params, batch, factors, "scaled", power=2
    )
    plain, wanted = stacked_value_and_grad(loss)(params, batch)
    np.testing.assert_allclose(losses, plain * factors**2, rtol=1e-6)
    for found, exact in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        by = (factors**2).reshape(-1, *(1,) * (exact.ndim - 1))
        np.testing.assert_allclose(found, exact * by, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="one for each of the 1 arguments after the batch"):
        stacked_value_and_grad(scaled, in_axes=(0, None))(params, batch, factors)


def test_objectives_may_be_functions_of_their_own(problem):
    """Each gets all arguments as they are; losses that are not finite are marked here too."""
    params, batch = problem
    functions = [
        lambda p, b: (loss(p, jax.tree.map(lambda x: x[0], b)), "first"),
        lambda p, b: (loss(p, jax.tree.map(lambda x: x[1], b)) + jnp.inf, "second"),
    ]
    (losses, aux), found = stacked_value_and_grad(functions, has_aux=True)(params, batch)
    plain, wanted = stacked_value_and_grad(loss)(params, batch)
    assert aux == ["first", "second"]
    np.testing.assert_allclose(losses[0], plain[0], rtol=1e-6)
    for name in params:
        np.testing.assert_allclose(found[name][0], wanted[name][0], rtol=1e-5, atol=1e-6)
        assert np.isnan(found[name][1]).all()
    with pytest.raises(ConfigError, match="one per objective; found none"):
        stacked_value_and_grad([])


def test_a_loss_that_is_not_finite_has_no_finite_gradient(problem):
    """Else an infinite loss whose derivative is finite would be followed as if it were none."""
    params, batch = problem
    added = jnp.array([0.0, jnp.inf, jnp.nan, 0.0])
    losses, gradients = stacked_value_and_grad(lambda p, b: loss(p, b) + b["added"])(
        params, batch | {"added": added}
    )
    np.testing.assert_array_equal(losses[1:3], added[1:3])
    _, finite = stacked_value_and_grad(loss)(params, batch)
    for found, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(finite), strict=True):
        assert np.isnan(found[1:3]).all()
        np.testing.assert_array_equal(found[::3], wanted[::3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {**b, "y": b["y"][:3]}, "x: 4, y: 3"),
        (lambda b: {**b, "y": jnp.float32(1)}, "y: no axis"),
        (lambda b: {}, "no arrays"),
    ],
)
def test_a_batch_without_a_common_axis_is_refused(problem, change, message):
    params, batch = problem
    with pytest.raises(DataError, match=message):
        stacked_value_and_grad(loss)(params, change(batch))
