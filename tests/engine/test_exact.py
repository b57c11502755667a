"""The backward pass gives what all gradients at once and resolve_conflicts give, on every mesh."""

import jax
import numpy as np
import pytest

from engine.cases import CASES, COORDINATES, MESHES, METHODS, PLAIN, RUNS, method, wanted
from engine.toy import assert_same, batches, engine, flatten, run_engine
from jaxmoo import aggregators, resolve_conflicts
from jaxmoo.mesh import make_mesh

BATCH = batches(4)[0]


@pytest.fixture(scope="module")
def one_device():
    return make_mesh(8, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def stacked():
    """Losses [4] and gradients [4, ...] of the plain model."""
    return jax.device_get(PLAIN.gradients(PLAIN.params, BATCH))


def cases_of(mesh, *fast):
    """The cases of a mesh; those that are not fast are marked."""
    return [
        pytest.param(mesh, name, marks=[] if name in fast else pytest.mark.slow)
        for name in RUNS[mesh]
    ]


@pytest.mark.parametrize(("mesh", "name"), cases_of("one device", "accumulated"))
def test_the_backward_pass_equals_the_stacked_oracle(mesh, name, one_device):
    assert_same(CASES[name].engine(one_device, pieces=4), wanted(name, pieces=4))


@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        case
        for mesh in MESHES
        for case in cases_of(
            mesh,
            "module, one objective absent",
            *(["expert, sent by hand"] if mesh == "4x2" else []),
        )
    ],
)
def test_the_mesh_does_not_change_the_result(mesh, name, on_mesh):
    _, language, fsdp = MESHES[mesh]
    assert_same(on_mesh(mesh, name), wanted(name, language * fsdp))


def test_the_cases_hold_every_aggregator_of_one_batch():
    assert len(CASES["aggregators"].aggregator) - 1 == len(METHODS)
    left_out = set(aggregators.names()) - set(METHODS)
    assert all(aggregators.get(name).cross_gram for name in left_out)
    by_coordinate = [name for name in METHODS if method(name, 8).combine is not None]
    assert sorted(by_coordinate) == sorted(COORDINATES)


@pytest.mark.slow
def test_the_cases_have_conflicts_and_states_that_matter():
    for name in ("aggregators", "layer, with preference and norm", "leaf, tied and shared"):
        result = wanted(name)
        steps = [[x for n, x in result.items() if n.startswith(f"step.{i}.1.")] for i in range(2)]
        first, second = (np.concatenate([np.ravel(x) for x in step]) for step in steps)
        assert all(np.abs(layer).max() > 0 for x in steps[0] for layer in np.atleast_1d(x))
        assert not np.array_equal(first, second)
        assert result["state.conflict"].max() > 0.15


def test_random_methods_draw_by_seed(one_device, stacked):
    """A seed gives the oracle's draws, another seed gives others."""
    options = {"aggregator": "random", "stacked": PLAIN.stacked, "num_objectives": 4}
    makers = [resolve_conflicts(**options, seed=seed) for seed in (3, 4)]
    states = [tx.init(PLAIN.params) for tx in makers]
    step = jax.jit(engine(PLAIN, 4, mesh=one_device, aggregator="random"))
    found = [step(PLAIN.params, BATCH, state) for state in states]
    expected, state = jax.jit(makers[0].update)(stacked[1], states[0], active=np.ones(4, bool))
    assert_same(*(flatten([x[-2]], x[-1]) for x in (found[0], (expected, state))))
    assert np.abs(found[0][2].weights - found[1][2].weights).max() > 0.1


def test_one_objective_without_an_aggregator_is_ordinary_training(one_device, stacked):
    first = jax.tree.map(lambda x: x[:1], BATCH)
    found = run_engine(PLAIN, [first], mesh=one_device, aggregator=None)
    for path, x in jax.tree_util.tree_leaves_with_path(stacked[1]):
        name = f"step.0.1.{jax.tree_util.keystr(path, simple=True, separator='.')}"
        np.testing.assert_allclose(found[name], x[0], rtol=0, atol=1e-5 * np.abs(x).max())


def test_gradients_may_be_sent_in_another_dtype(one_device, stacked):
    dtype = jax.numpy.bfloat16
    found = run_engine(PLAIN, [BATCH], mesh=one_device, aggregator="mean", dtype=dtype)
    for path, x in jax.tree_util.tree_leaves_with_path(stacked[1]):
        name = f"step.0.1.{jax.tree_util.keystr(path, simple=True, separator='.')}"
        exact = x.mean(0)
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], exact, rtol=0, atol=2**-6 * np.abs(exact).max())
    kernel = stacked[1]["layers"]["mix"]["kernel"].mean(0)
    error = np.abs(found["step.0.1.layers.mix.kernel"] - kernel).max()
    assert error > 2**-12 * np.abs(kernel).max()
