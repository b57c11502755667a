"""Gradients from factors are those of differentiation, one at a time and summed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoo.engine.in_parts import backward_in_parts

K, ROWS, D, H = 3, 4, 5, 6


def mlp(parameters, given, fixed):
    (first, bias, second, scale), (x,), (mask,) = parameters, given, fixed
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-3) * scale
    h = jax.nn.silu(x @ first + bias)
    return [jnp.where(mask[:, None], x + h @ second, 0), h.sum()]


def lookup(parameters, given, fixed):
    return [jnp.tanh(parameters[0][fixed[0]]) * given[0][:, None]]


def attention(parameters, given, fixed):
    del fixed
    queries, keys = (given[0] @ w for w in parameters)
    return [jax.nn.softmax(jnp.einsum("td,sd->ts", queries, keys)) @ given[0]]


@jax.checkpoint
def inner(w, x):
    return jnp.sin(x @ w)


def checkpointed(parameters, given, fixed):
    del fixed
    return [inner(parameters[0], given[0]) @ parameters[1]]


def divided(parameters, given, fixed):
    del fixed
    return [parameters[0] / given[0]]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


FUNCTIONS = {
    "a layer": (
        mlp,
        [normal(0, D, H), normal(1, H), normal(2, H, D), jnp.float32(0.7)],
        [normal(3, K, ROWS, D)],
        [normal(4, K, ROWS) > 0],
    ),
    "a lookup": (
        lookup,
        [normal(0, 9, D)],
        [normal(1, K, ROWS)],
        [jnp.arange(K * ROWS).reshape(K, ROWS) % 7],
    ),
    "a division": (divided, [normal(0, D)], [2 + normal(1, K, ROWS, D) ** 2], []),
    "products of products": (
        attention,
        [normal(0, D, H), normal(1, D, H)],
        [normal(2, K, ROWS, D)],
        [],
    ),
    "a call that is computed again": (
        checkpointed,
        [normal(0, D, H), normal(1, H, D)],
        [normal(2, K, ROWS, D)],
        [],
    ),
}


def stacked(function, parameters, given, fixed, cotangents):
    """Cotangents of the parameters and of what is given, by definition, [K, ...]."""

    def back(given, fixed, cotangents):
        return jax.vjp(lambda p, x: function(p, x, fixed), parameters, given)[1](cotangents)

    return jax.vmap(back)(given, fixed, cotangents)


def cotangents_of(function, parameters, given, fixed):
    shapes = jax.eval_shape(jax.vmap(function, (None, 0, 0)), parameters, given, fixed)
    return [normal(10 + i, *x.shape) for i, x in enumerate(shapes)]


def assert_near(found, wanted):
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(np.abs(y).max()))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_follow_from_their_factors(name):
    function, parameters, given, fixed = FUNCTIONS[name]
    above = cotangents_of(function, parameters, given, fixed)
    gradients, of_given = stacked(function, parameters, given, fixed, above)
    weights = jnp.asarray([0.5, 0.0, -2.0])

    @jax.jit
    def found():
        mine, factors = backward_in_parts(function, parameters, given, fixed, above)
        return mine, [factors.of(jnp.int32(k)) for k in range(K)], factors.combined(weights)

    mine, each, summed = found()
    assert_near(mine, of_given)
    for k, alone in enumerate(each):
        assert_near(alone, [g[k] for g in gradients])
    assert_near(summed, [jnp.tensordot(weights, g, 1) for g in gradients])


def test_weights_are_not_rounded_to_the_factors_precision():
    """Else an objective would weigh too much, or too little, in all of a gradient alike."""
    weight = 0.7  # in bfloat16, 0.1 % less
    x, above = (2 + normal(i, K, 8192) ** 2 for i in range(2))
    x, above = x.astype(jnp.bfloat16), above.astype(jnp.bfloat16)

    def scale(parameters, given, fixed):
        del fixed
        return [given[0] * parameters[0]]

    _, factors = backward_in_parts(scale, [jnp.ones(8192, jnp.bfloat16)], [x], [], [above])
    (found,) = factors.combined(jnp.full(K, weight, jnp.float32))
    exact = np.asarray(x, np.float64) * np.asarray(above, np.float64)
    np.testing.assert_allclose(np.float64(found).sum() / exact.sum(), weight, rtol=4e-4)


def test_factors_are_as_large_as_activations():
    """No value has both an objective's axis and the size of a parameter."""
    function, parameters, given, fixed = FUNCTIONS["a layer"]
    above = cotangents_of(function, parameters, given, fixed)
    _, factors = backward_in_parts(function, parameters, given, fixed, above)
    sizes = {f.value.size for f in factors.known.values() if f.axis is not None}
    assert max(sizes) == K * ROWS * max(D, H)
    assert all(f.axis is not None for f in factors.known.values() if f.linear)


def test_an_objective_of_weight_zero_may_be_not_finite():
    function, parameters, given, fixed = FUNCTIONS["a layer"]
    above = cotangents_of(function, parameters, given, fixed)
    given, above = [given[0].at[1].set(jnp.nan)], [above[0].at[1].set(jnp.inf), above[1]]
    _, factors = backward_in_parts(function, parameters, given, fixed, above)
    gradients, _ = stacked(function, parameters, given, fixed, above)
    summed = factors.combined(jnp.asarray([1.0, 0.0, 1.0]))
    assert_near(summed, [g[0] + g[2] for g in gradients])


def test_a_loop_over_parameters_is_not_taken_apart():
    def looped(parameters, given, fixed):
        del fixed
        step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        return [jax.lax.scan(step, given[0], parameters[0])[0]]

    arguments = [normal(0, 2, D, D)], [normal(1, K, ROWS, D)], []
    above = cotangents_of(looped, *arguments)
    assert backward_in_parts(looped, *arguments, above) is None
