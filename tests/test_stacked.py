"""Per-objective gradients: each objective's own, whatever else is in the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoo import stacked_value_and_grad
from jaxmoo.errors import DataError


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
