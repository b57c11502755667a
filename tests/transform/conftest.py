"""Parameters of a small tree, and conflicting gradients of them."""

import jax
import jax.numpy as jnp
import pytest

from transform.trees import K


@pytest.fixture(scope="module")
def params():
    shapes = {
        "embed": (6, 4),
        "layers": {"attn": {"q": (5, 4, 4)}, "mlp": {"up": (5, 4, 6), "bias": (5, 6)}},
        "scale": (),
    }
    return jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))


@pytest.fixture(scope="module")
def updates(params):
    """Conflicting gradients of K objectives."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(
        treedef,
        [jax.random.normal(k, (K, *x.shape)) for k, x in zip(keys, leaves, strict=True)],
    )
