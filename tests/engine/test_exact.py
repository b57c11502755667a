"""The backward pass gives what all gradients at once and resolve_conflicts give, on every mesh."""

import jax
import numpy as np
import pytest

from engine.cases import CASES, MESHES, METHODS, PLAIN, RUNS, wanted
from engine.toy import assert_same, batches, run_engine, run_oracle
from jaxmoo import aggregators
from jaxmoo.mesh import make_mesh


@pytest.fixture(scope="module")
def one_device():
    return make_mesh(8, devices=jax.devices()[:1])


@pytest.mark.parametrize("name", [name for name in CASES if "objectives" not in name])
def test_the_backward_pass_equals_the_stacked_oracle(name, one_device):
    assert_same(CASES[name].engine(one_device, pieces=4), wanted(name, pieces=4))


@pytest.mark.parametrize(
    ("mesh", "name"), [(mesh, name) for mesh, names in RUNS.items() for name in names]
)
def test_the_mesh_does_not_change_the_result(mesh, name, on_mesh):
    _, language, fsdp = MESHES[mesh]
    assert_same(on_mesh(mesh, name), wanted(name, language * fsdp))


def test_the_cases_hold_every_aggregator_of_one_batch():
    held = [len(CASES[f"aggregators of {mesh}"].aggregator) - 1 for mesh in MESHES]
    assert sum(held) == len(METHODS)
    left_out = set(aggregators.names()) - set(METHODS)
    assert all(aggregators.get(name).cross_gram for name in left_out)


def test_the_cases_have_conflicts_and_states_that_matter():
    for name in (*(f"aggregators of {mesh}" for mesh in MESHES), "layer", "tied"):
        result = wanted(name)
        first, second = (result[f"step.{i}.1.layers.mix.kernel"] for i in range(2))
        assert all(np.abs(layer).max() > 0 for layer in first)
        assert not np.array_equal(first, second)
        assert result["state.conflict"].max() > 0.15


def test_random_methods_draw_by_seed(one_device):
    """A seed gives the oracle's draws, another seed gives others."""
    data = batches(4)
    found = [run_engine(PLAIN, data, mesh=one_device, aggregator="random", seed=s) for s in (3, 4)]
    assert_same(found[0], run_oracle(PLAIN, data, aggregator="random", seed=3))
    assert np.abs(found[0]["state.weights"] - found[1]["state.weights"]).max() > 0.1


def test_one_objective_without_an_aggregator_is_ordinary_training(one_device):
    (batch,) = batches(1)
    found = run_engine(PLAIN, [batch], mesh=one_device, aggregator=None)
    _, gradients = PLAIN.gradients(PLAIN.params, batch)
    for path, x in jax.tree_util.tree_leaves_with_path(gradients):
        name = f"step.0.1.{jax.tree_util.keystr(path, simple=True, separator='.')}"
        np.testing.assert_allclose(found[name], x[0], rtol=0, atol=1e-5 * np.abs(x).max())


def test_gradients_may_be_sent_in_another_dtype(one_device):
    data = batches(4)
    exact, found = (
        run_engine(PLAIN, data, mesh=one_device, aggregator="mean", dtype=dtype)
        for dtype in (None, jax.numpy.bfloat16)
    )
    for name in (name for name in exact if name.startswith("step.0.1.")):
        assert found[name].dtype == np.float32
        bound = 2**-6 * np.abs(exact[name]).max()
        np.testing.assert_allclose(found[name], exact[name], rtol=0, atol=bound)
    kernel = "step.0.1.layers.mix.kernel"
    assert not np.array_equal(found[kernel], exact[kernel])
