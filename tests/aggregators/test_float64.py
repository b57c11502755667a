"""The aggregators in float64, which ``JAX_ENABLE_X64=1`` allows: float64 in, float64 accuracy out.

The promises are those of float32, held to float64's rounding.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmoo
from aggregators import families, oracles
from aggregators.families import (
    KEY,
    LABELS,
    STACK,
    VARIANTS,
    K,
    N,
    assert_scaling_is_exact,
    mean_size,
    rotation_errors,
    size,
)
from aggregators.test_exact_methods import ORACLES, formula_errors
from aggregators.test_properties import NON_CONFLICTING, projections
from jaxmoo import aggregators
from jaxmoo.aggregators import aggregate, weigh_block, weigh_blocks

METHODS = (*(n for n in aggregators.names() if n in VARIANTS), "fairgrad published")
WEIGHED = tuple(name for name in METHODS if VARIANTS[name].combine is None)
STATEFUL = ("gradvac", "cr_mogm", "excess_mtl", "moco", "modo", "sdmgrad")
# The hull of these gradients reaches the origin: lengths are known to the root of rounding.
STATIONARY = ("low-rank", "imbalanced low-rank", "opposed", "all-zero")
ROUNDING = 1e-14


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


resolve = functools.partial(families.resolve, dtype=jnp.float64)


@pytest.mark.parametrize("name", [name for name in METHODS if name in ORACLES])
def test_method_equals_its_formula(name):
    for family, seed, error in formula_errors(resolve, name):
        bound = 3e-8 if family in STATIONARY else 1e-12
        assert error <= bound, (family, seed)


@pytest.mark.slow
def test_cagrad_has_no_duality_gap():
    """``min_i <g_i, d>`` of a d in the ball is the dual objective of the weights' w."""
    weights, _ = resolve("cagrad", STACK)
    for i, (family, seed) in enumerate(LABELS):
        j = STACK[i][np.any(STACK[i] != 0, axis=1)]
        if family in (*STATIONARY, "nearly opposed") or len(j) < 2:
            continue
        mean = j.mean(0)
        y = 1.5 * weights[i][np.any(STACK[i] != 0, axis=1)] - 1 / len(j)
        radius, correction, w = 0.5 * np.linalg.norm(mean), y @ j, y / y.sum()
        assert np.linalg.norm(correction) == pytest.approx(radius, rel=1e-10), (family, seed)
        dual = w @ j @ mean + radius * np.linalg.norm(w @ j)
        norm = np.linalg.norm(j, axis=1)
        short = (dual - j @ (mean + correction)) / (norm * ((1 / len(j) + y) @ norm))
        assert short.max() <= ROUNDING, (family, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WEIGHED if name in NON_CONFLICTING])
def test_no_objective_is_opposed(name):
    weights, updates = resolve(name, STACK)
    worst = projections(updates, STACK).min(1) / (size(weights, STACK) + mean_size(STACK))
    assert worst.min() >= -ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize(("name", "alpha"), [("fairgrad", 1.0), ("nash_mtl", 1.0)])
def test_improvements_satisfy_the_equations(name, alpha):
    weights, updates = resolve(name, STACK)
    for i, (family, seed) in enumerate(LABELS):
        if family not in (*STATIONARY, "nearly opposed"):
            rows = np.any(STACK[i] != 0, axis=1)
            product = weights[i][rows] * (STACK[i][rows] @ updates[i]) ** alpha
            np.testing.assert_allclose(product, product[0], rtol=1e-11, err_msg=f"{family} {seed}")


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHED)
def test_only_inner_products_matter(name):
    for (family, seed), value in zip(LABELS, rotation_errors(resolve, name), strict=True):
        if family not in ("opposed", "nearly opposed", "duplicates", "equal", *STATIONARY):
            assert value <= ROUNDING, (family, seed)


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [-400, 400])
@pytest.mark.parametrize("name", WEIGHED)
def test_scaling_by_a_power_of_two_is_exact(name, exponent):
    """Far beyond float32's range."""
    assert_scaling_is_exact(resolve, name, exponent, rounding=1e-13)


@pytest.mark.parametrize("name", ["mean", "mgda", "trimmed_mean", "graddrop"])
def test_a_matrix_of_float64_is_never_rounded_to_float32(name):
    """From the gradients to the update, in either way of forming a Gram matrix."""
    method = aggregators.graddrop(1.0) if name == "graddrop" else aggregators.get(name)
    exact = {
        "mgda": lambda j: oracles.min_norm(j) @ j,
        "trimmed_mean": lambda j: np.sort(j, axis=0)[1:-1].mean(0),
    }.get(name, lambda j: j.mean(0))
    for n in (7, 1000) if method.reads_gram and method.combine is None else (1000,):
        j = np.random.default_rng(0).standard_normal((4, n))
        resolve = jax.jit(lambda j: aggregate(method, j, key=KEY))
        update = resolve(j * 1e100)
        np.testing.assert_allclose(update / 1e100, exact(j), rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_updates_have_the_type_of_the_gradients(name, dtype):
    """Beside float64 ones, too."""

    def update(j):
        return aggregate(VARIANTS[name], j, second=j, key=KEY)

    shape = jax.eval_shape(update, jax.ShapeDtypeStruct((K, N), dtype))
    assert (shape.shape, shape.dtype) == ((N,), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("made_in", ["float64", "float32"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", STATEFUL)
def test_states_are_carried_by_a_scan(name, dtype, made_in):
    """Whatever the types of the Gram matrices and of a state that was saved."""
    method = VARIANTS[name]
    state = jax.tree.map(lambda x: x.astype(made_in), aggregators.init_blocks(method, 2, K))

    def train(grams, state):
        def step(state, key):
            return weigh_blocks(method, grams, state=state, key=key)[::-1]

        return jax.lax.scan(step, state, jax.random.split(KEY, 3))

    after, weights = jax.eval_shape(train, jax.ShapeDtypeStruct((2, K, K), dtype), state)
    assert weights.dtype == dtype
    assert {leaf.dtype.name for leaf in jax.tree.leaves(after)} == {made_in}


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        aggregators.cagrad,
        aggregators.fairgrad,
        aggregators.gradvac,
        aggregators.sdmgrad,
        lambda v: aggregators.moco(gamma=v, rho=v),
        lambda v: aggregators.cr_mogm(momentum=v),
        lambda v: aggregators.imtl_g(bound=v),
        lambda v: aggregators.nash_mtl(max_norm=v, scale="published"),
    ],
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_traced_parameters_may_be_of_another_type(make, dtype):
    def weigh(gram, value):
        return weigh_block(make(value), gram, key=KEY)[0]

    other = "float32" if dtype == "float64" else "float64"
    gram = jax.ShapeDtypeStruct((K, K), dtype)
    weights = jax.eval_shape(weigh, gram, jax.ShapeDtypeStruct((), other))
    assert weights.dtype == dtype


def test_a_running_mean_of_weights_is_as_accurate_as_they_are():
    method = aggregators.cr_mogm("mgda", momentum=0.5)

    @jax.jit
    def step(gram, state):
        return weigh_block(method, gram, state=state), weigh_block(aggregators.mgda(), gram)[0]

    state, singles = method.init(K), []
    for t, factor in enumerate((1.0, 2.0, 0.5), start=1):
        rows = STACK[0] * np.where(np.arange(K) == 0, factor, 1.0)[:, None]
        (weights, state), single = step(rows @ rows.T, state)
        singles.append(np.asarray(single))
        past = 0.5 ** np.arange(t)[::-1]
        np.testing.assert_allclose(weights, past / past.sum() @ np.stack(singles), rtol=1e-12)


@pytest.mark.parametrize("method", [pytest.param("mgda", marks=pytest.mark.slow), "cr_mogm"])
def test_the_transformation_keeps_float64_and_its_states_types(method):
    """In a scan over steps, with preferences; the state's diagnostics stay float32."""
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 8, 3), "b": (4, 3)}
    gradients = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    preference = [1.0, 2.0, 3.0, 1.0]
    tx = jaxmoo.resolve_conflicts(
        method, blocks="whole", num_objectives=4, preference=preference, match_norm=method != "mgda"
    )

    @jax.jit
    def train(gradients):
        def step(state, _):
            return tx.update(gradients, state)[::-1]

        state = tx.init(jax.tree.map(lambda x: x[0], gradients))
        return jax.lax.scan(step, state, length=2)

    state, updates = train(jax.tree.map(jnp.asarray, gradients))
    assert optax.tree.get(state, "gram").dtype == jnp.float32
    j = np.hstack([x.reshape(4, -1) for x in gradients.values()])
    share = np.array(preference) / sum(preference)
    heard = oracles.min_norm(share[:, None] * j) * share
    expected = heard / heard.sum() @ j
    if method != "mgda":
        expected *= np.linalg.norm(share @ j) / np.linalg.norm(expected)
    found = np.hstack([np.asarray(updates[name][1]).reshape(-1) for name in gradients])
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
