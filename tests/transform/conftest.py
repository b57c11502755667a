"""Parameters of a small tree, and conflicting gradients of them."""

import jax
import numpy as np
import pytest

from transform.trees import K


@pytest.fixture(scope="session")
def params():
    shapes = {
        "embed": (6, 4),
        "layers": {"attn": {"q": (5, 4, 4)}, "mlp": {"up": (5, 4, 6), "bias": (5, 6)}},
        "scale": (),
    }
    return jax.tree.map(
        lambda shape: np.zeros(shape, np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


@pytest.fixture(scope="session")
def updates(params):
    """Conflicting gradients of K objectives."""
    leaves, treedef = jax.tree.flatten(params)

    @jax.jit
    def draw(key):
        keys = jax.random.split(key, len(leaves))
        return [jax.random.normal(k, (K, *x.shape)) for k, x in zip(keys, leaves, strict=True)]

    drawn = draw(jax.random.key(0))
    return jax.tree.unflatten(treedef, [np.asarray(x) for x in drawn])
