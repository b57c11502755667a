"""Several replicas: each order of averaging and resolving gives its own definition's result.

The exact order, ``mean_then_resolve``, is that of all other cases.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoo
from engine.cases import REPLICAS
from engine.toy import batches
from jaxmoo import aggregators, blocks
from jaxmoo.errors import ConfigError

CASE = REPLICAS["replicas alone"]
K, TOY, METHOD = CASE.k, CASE.toy, CASE.aggregator
R = 2  # replicas of the mesh
MESH = "2x2x2"


@pytest.fixture(scope="module")
def gradients():
    """Each replica's gradients [K, ...], scaled such that their mean is that of the whole batch."""
    (batch,) = jax.device_get(batches(K))
    stacked = jax.jit(jaxmoo.stacked_value_and_grad(TOY.loss))
    tokens = batch["mask"].sum((1, 2))

    def of(replica):
        rows = slice(4 * replica, 4 * replica + 4)
        _, found = jax.device_get(stacked(TOY.params, jax.tree.map(lambda x: x[:, rows], batch)))
        return jax.tree.map(lambda x: x * (R / tokens).reshape(-1, *(1,) * (x.ndim - 1)), found)

    return [of(replica) for replica in range(R)]


@pytest.fixture(scope="module")
def resolve():
    """All objectives' gradients to one gradient, on a single device."""
    tx = jaxmoo.resolve_conflicts(METHOD, "layer", stacked=TOY.stacked, num_objectives=K)
    update, state = jax.jit(tx.update), tx.init(TOY.params)
    return lambda gradients: jax.device_get(update(gradients, state, TOY.params)[0])


def assert_updates(found, expected):
    for path, x in jax.tree_util.tree_leaves_with_path(expected):
        name = f"step.0.1.{jax.tree_util.keystr(path, simple=True, separator='.')}"
        x = np.asarray(x)
        np.testing.assert_allclose(found[name], x, rtol=0, atol=1e-5 * np.abs(x).max())


def mean_of(trees):
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


@pytest.fixture(scope="module")
def alone(gradients, resolve):
    """Every replica resolves its own gradients; the results are averaged."""
    return mean_of([resolve(each) for each in gradients])


@pytest.fixture(scope="module")
def pooled(gradients):
    """The update and the Gram matrices when the weights follow from the replicas' mean ones."""
    part = blocks.partition("layer", TOY.params, stacked=TOY.stacked)
    tree = jax.tree.structure(TOY.params)
    grams = np.zeros((len(part), K, K))
    for each in gradients:
        for x, labels in zip(jax.tree.leaves(each), part.labels, strict=True):
            rows = np.asarray(x, np.float64).reshape(K, len(labels), -1)
            np.add.at(grams, labels, np.einsum("isn,jsn->sij", rows, rows) / R)
    weights, _ = aggregators.weigh_blocks(
        aggregators.get(METHOD),
        jnp.asarray(grams, jnp.float32),
        key=jax.random.fold_in(jax.random.key(0), 0),
    )
    combined = [
        np.einsum("sk,ksn->sn", weights[labels], np.reshape(x, (K, len(labels), -1))).reshape(
            x.shape[1:]
        )
        for x, labels in zip(jax.tree.leaves(mean_of(gradients)), part.labels, strict=True)
    ]
    return jax.tree.unflatten(tree, combined), grams


@pytest.mark.slow
def test_results_of_replicas_are_averaged(on_mesh, alone):
    assert_updates(on_mesh(MESH, "replicas alone"), alone)


def test_gram_matrices_of_replicas_are_pooled(on_mesh, pooled):
    found, (expected, grams) = on_mesh(MESH, "replicas pooled"), pooled
    assert_updates(found, expected)
    np.testing.assert_allclose(found["state.gram"], grams, atol=1e-5 * grams.max())


def test_the_orders_differ(gradients, resolve, alone, pooled):
    orders = [tree["head"]["kernel"] for tree in (resolve(mean_of(gradients)), alone, pooled[0])]
    for x, y in itertools.combinations(orders, 2):
        assert np.abs(x - y).max() > 1e-3 * np.abs(y).max()


def test_rules_without_a_gram_matrix_cannot_pool_it():
    with pytest.raises(ConfigError, match=r"graddrop works coordinate by coordinate.*replicas="):
        jaxmoo.engine.resolved_value_and_grad(
            TOY.loss,
            TOY.params,
            num_objectives=K,
            aggregator="graddrop",
            replicas="pooled_gram",
        )
