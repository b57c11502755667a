"""The shared mechanism: masks, failures, shares, scales, keys and states."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aggregators import families, oracles
from aggregators.families import KEY, STACK, K, resolve
from jaxmoo import aggregators
from jaxmoo.aggregators import aggregate, weigh_block, weigh_blocks
from jaxmoo.aggregators.weighing import prepare
from jaxmoo.errors import ConfigError, DataError

PAIR = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], np.float32)
MEAN = aggregators.mean()
SHORTEST = oracles.min_norm(PAIR) @ PAIR


def with_row(row) -> np.ndarray:
    return np.vstack([PAIR, np.asarray(row, np.float32)])


def products(*blocks: np.ndarray) -> np.ndarray:
    return np.stack([j @ j.T for j in blocks])


def test_a_matrix_with_a_zero_row_is_a_matrix_without_it():
    """In a matrix on its own a zero gradient is an absent objective."""
    for name, expected in (("mean", PAIR.mean(0)), ("sum", PAIR.sum(0)), ("mgda", SHORTEST)):
        np.testing.assert_allclose(aggregate(name, with_row([0.0] * 3)), expected, atol=1e-5)


def test_a_zero_row_in_some_blocks_keeps_its_share():
    """There the objective is present but indifferent, and the mean stays the mean."""
    methods = (MEAN, aggregators.mgda(), aggregators.sum())
    weigh = jax.jit(lambda grams: [weigh_blocks(method, grams)[0] for method in methods])
    weights, shortest, total = weigh(products(with_row([0.0] * 3), with_row([1.0, 2.0, 3.0])))
    np.testing.assert_allclose(weights, [[1 / 3, 1 / 3, 0], [1 / 3, 1 / 3, 1 / 3]], rtol=1e-6)
    # A method's direction is that of the others, and its length shrinks as the mean's does.
    np.testing.assert_allclose(shortest[0], [0.4, 0.4 * 2 / 3, 0], rtol=1e-5)
    np.testing.assert_allclose(total[0], [1, 1, 0], rtol=1e-6)


def test_a_zero_row_in_all_blocks_is_absent():
    grams = products(*[with_row([0.0] * 3)] * 2)
    np.testing.assert_allclose(weigh_blocks(MEAN, grams)[0], [[0.5, 0.5, 0]] * 2, rtol=1e-6)


def test_an_absent_objective_leaves_its_share_to_the_others():
    active = jnp.array([True, True, False])
    for row in ([1.0, 2.0, 3.0], [np.nan] * 3):
        d = aggregate("mean", with_row(row), active=active)
        np.testing.assert_allclose(d, PAIR.mean(0), rtol=1e-6)


def test_active_may_differ_between_blocks():
    grams = products(*[with_row([1.0, 2.0, 3.0])] * 2)
    active = jnp.array([[True, False, False], [True, True, False]])
    weights, _ = weigh_blocks(MEAN, grams, active=active)
    np.testing.assert_allclose(weights, [[1, 0, 0], [0.5, 0.5, 0]])


def test_one_non_finite_row_does_not_poison_the_others():
    for bad in (np.nan, np.inf, -np.inf):
        d = aggregate("mgda", with_row([bad, 1.0, 1.0]))
        np.testing.assert_allclose(d, SHORTEST, rtol=1e-6, atol=1e-6)


def test_a_non_finite_row_can_be_refused():
    with pytest.raises(DataError, match=r"objectives \[2\] are not finite"):
        aggregate("mean", with_row([np.nan, 1.0, 1.0]), nonfinite="raise")
    aggregate("mean", with_row([np.nan, 1.0, 1.0]), active=[True, True, False], nonfinite="raise")
    with pytest.raises(ConfigError, match="cannot raise from compiled code"):
        jax.jit(lambda j: aggregate("mean", j, nonfinite="raise"))(PAIR)


@pytest.mark.parametrize("name", ["mean", "sum", "random", "constant"])
def test_methods_that_do_not_need_the_gram_matrix_notice_the_same_rows(name):
    """They look at the gradients once, and again only if something is amiss."""
    method = aggregators.constant([1.0, 2.0, 3.0]) if name == "constant" else aggregators.get(name)
    assert not method.reads_gram
    clean = np.random.default_rng(0).standard_normal((3, 5000)).astype(np.float32)
    late, zero, nan, inf = (clean.copy() for _ in range(4))
    late[1, :-1] = 0.0  # not zero, but for most of its length
    zero[1] = 0.0
    nan[1, 4000] = np.nan
    inf[:2, 7] = np.inf, -np.inf
    equal, unheard = np.ones(3, np.float32), np.array([1.0, 0.0, 2.0], np.float32)

    @jax.jit
    def with_gram(j, heard, preference):
        gram = aggregators.gram(j)
        weights, _ = weigh_block(method, gram, key=KEY, active=heard, preference=preference)
        return aggregators.combine_rows(j, weights)

    @jax.jit
    def without(j, active, preference):
        return aggregate(method, j, key=KEY, active=active, preference=preference)

    for j, preference in itertools.product((clean, late, zero, nan, inf), (equal, unheard)):
        for active in (None, np.array([True, True, False])):
            heard = np.any(j != 0, axis=1) if active is None else active
            found = without(j, active, preference)
            expected = with_gram(j, heard, preference)
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_everything_failed_gives_zero():
    np.testing.assert_array_equal(
        aggregate("mgda", jnp.full((3, 3), jnp.nan, jnp.float32)), jnp.zeros(3)
    )


def test_preferences_are_relative_and_renormalised():
    j = with_row([1.0, 2.0, 3.0])
    d = aggregate("mean", j, preference=jnp.array([1.0, 3.0, 4.0]))
    np.testing.assert_allclose(d, jnp.array([1.0, 3.0, 4.0]) / 8 @ j, rtol=1e-6)
    d = aggregate(
        "mean", j, preference=jnp.array([1.0, 3.0, 4.0]), active=jnp.array([True, True, False])
    )
    np.testing.assert_allclose(d, jnp.array([1.0, 3.0]) / 4 @ PAIR, rtol=1e-6)


@pytest.mark.parametrize("name", ["mgda", "cagrad", "fairgrad", "upgrad", "pcgrad", "config"])
def test_an_objective_may_have_no_preference(name):
    (weights,) = families.weigh(
        name, products(PAIR), np.ones((1, 2), bool), preference=np.array([1.0, 0.0])
    )
    d = weights @ PAIR
    assert np.isfinite(d).all() and PAIR[0] @ d > 0


def test_the_gram_matrix_is_normalised_exactly():
    g = np.asarray(STACK[2] @ STACK[2].T, np.float32)
    prepared = jax.jit(prepare)
    full, small = (prepared(g * scale) for scale in (np.float32(1), np.float32(2**-60)))
    np.testing.assert_array_equal(small.gram, full.gram)
    assert 1 <= float(jnp.diagonal(small.gram).max()) < 2
    assert float(small.scale) == float(full.scale) * 2.0**-60


def test_gradients_of_very_different_blocks_meet_no_threshold():
    """Scales from 1e-12 to 1e12 in one batch."""
    scales = 2.0 ** np.arange(-40, 41, 8)
    weights, _ = resolve("mgda", STACK[0] * scales[:, None, None])
    np.testing.assert_array_equal(weights, np.broadcast_to(weights[0], weights.shape))


def test_every_block_draws_its_own_numbers():
    grams = np.stack([np.eye(K, dtype=np.float32)] * 3)
    weights, _ = weigh_blocks(aggregators.random(), grams, key=KEY)
    assert len(np.unique(np.asarray(weights)[:, 0])) == 3
    for block in range(3):
        alone, _ = weigh_block(aggregators.random(), grams[block], key=KEY, block=block)
        np.testing.assert_allclose(alone, weights[block], rtol=1e-6)


def test_a_stochastic_method_needs_a_key():
    with pytest.raises(ConfigError, match="'pcgrad' is stochastic"):
        aggregate("pcgrad", PAIR)


def test_state_has_a_leading_block_axis_and_is_kept_per_block():
    method = aggregators.cr_mogm("unit_mean", momentum=0.5)
    state = aggregators.init_blocks(method, 3, 2)
    assert state.average.shape == (3, 2)
    grams = products(*[PAIR * np.float32([[s], [1.0]]) for s in (1.0, 2.0, 5.0)])
    _, state = weigh_blocks(method, grams, state=state)
    _, alone = weigh_block(method, grams[1])
    np.testing.assert_allclose(state.average[1], alone.average, rtol=1e-6)
    assert not np.allclose(state.average[0], state.average[1])


def test_a_block_without_gradient_leaves_its_state():
    smoothed = aggregators.cr_mogm("unit_mean")
    methods = ["gradvac", smoothed, "excess_mtl", "moco", "modo", "sdmgrad"]

    @jax.jit
    def two_steps(grams):
        def states(method):
            def step(state, gram):
                _, state = weigh_block(method, gram, state=state, key=KEY)
                return state, state

            return jax.lax.scan(step, method.init(2), grams)[1]

        return [states(aggregators.get(name)) for name in methods]

    gram = PAIR @ PAIR.T
    for name, states in zip(methods, two_steps(np.stack([gram, 0 * gram])), strict=True):
        for leaf in jax.tree.leaves(states):
            np.testing.assert_allclose(leaf[0], leaf[1], rtol=1e-6, err_msg=str(name))


def test_grams_of_pieces_add_up():
    j = jnp.asarray(STACK[0], jnp.float32)
    pieces = aggregators.gram(j[:, :5]) + aggregators.gram(j[:, 5:])
    np.testing.assert_allclose(pieces, aggregators.gram(j), rtol=1e-5, atol=1e-5)


def test_scan_and_grad_free_use():
    """A step inside scan, with the state carried."""
    method = aggregators.gradvac()
    grams = products(PAIR, PAIR)

    def step(state, key):
        weights, state = weigh_blocks(method, grams, state=state, key=key)
        return state, weights

    state, weights = jax.lax.scan(
        step, aggregators.init_blocks(method, 2, 2), jax.random.split(KEY, 4)
    )
    assert weights.shape == (4, 2, 2) and np.isfinite(weights).all()
    assert (np.asarray(state)[:, 0, 1] < 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "variant", "value", "other"),
    [
        (aggregators.cagrad, "cagrad", 0.5, 0.3),
        (aggregators.fairgrad, "fairgrad 2", 2.0, 1.5),
        (aggregators.gradvac, "gradvac", 0.5, None),
        (lambda v: aggregators.fairgrad(v, scale="published"), "fairgrad published", 2.0, 1.5),
        (
            lambda v: aggregators.nash_mtl(max_norm=v, scale="published"),
            "nash_mtl published",
            1.0,
            0.5,
        ),
        (lambda v: aggregators.sdmgrad(v), "sdmgrad", 0.3, 9.0),
        (lambda v: aggregators.imtl_g(bound=v), "imtl_g", 10.0, None),
        (lambda v: aggregators.cr_mogm("mgda", momentum=v), "cr_mogm", 0.9, None),
    ],
)
def test_parameters_may_be_traced(factory, variant, value, other):
    """So a schedule can change them inside a compiled step."""
    block = families.filled(STACK[0] @ STACK[0].T)
    traced = jax.jit(lambda v: weigh_block(factory(v), block, key=KEY)[0][:K])
    fixed, _ = resolve(variant, STACK)
    np.testing.assert_allclose(traced(value), fixed[0], rtol=1e-4, atol=1e-6)
    if other is not None:  # the others show on other gradients, or from the second step on
        assert np.abs(traced(other) - traced(value)).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"jacobian": jnp.zeros(3)}, r"expected a float matrix \[K, n\]"),
        ({"jacobian": jnp.zeros((2, 3), int)}, "found int32"),
        ({"jacobian": PAIR, "active": jnp.ones(3, bool)}, r"active of shape \(2,\)"),
        ({"jacobian": PAIR, "preference": jnp.ones(3)}, r"preference of shape \(2,\)"),
        ({"jacobian": PAIR, "preference": jnp.array([1.0, -1.0])}, "preferences >= 0"),
        ({"jacobian": PAIR, "preference": jnp.zeros(2)}, "preferences >= 0"),
        ({"jacobian": PAIR, "nonfinite": "rais"}, "Did you mean 'raise'"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        aggregate("mgda", **arguments)


def test_weights_for_another_number_of_objectives_are_refused():
    with pytest.raises(ConfigError, match="given 3 weights, but there are 2 objectives"):
        aggregate(aggregators.constant([1.0, 2.0, 3.0]), PAIR)


def test_a_second_batch_is_asked_for():
    with pytest.raises(ConfigError, match="independent second batch"):
        aggregate("modo", PAIR)
