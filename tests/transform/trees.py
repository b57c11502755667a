"""What the tests of ``resolve_conflicts`` share: how a small tree is cut and updated."""

import functools

import jax
import numpy as np

import jaxmoo

K = 3
STACKED = r"^layers\."

# Once for each transformation's update.
compiled = functools.cache(jax.jit)


def compiled_update(tx, updates, params, state=None, **extra):
    """One update, compiled as users compile it, and the state after it."""
    state = tx.init(params) if state is None else state
    found, state = compiled(tx.update)(updates, state, params, **extra)
    return jax.tree.map(np.asarray, found), state


def replaced(x, where, value):
    """An array in which some entries have another value."""
    x = np.array(x)
    x[where] = value
    return x


def resolver(methods, rule="layer"):
    """The transformation of K objectives, the same for every test that asks for it."""
    return _resolver(tuple(methods.items()) if isinstance(methods, dict) else methods, rule)


@functools.cache
def _resolver(methods, rule):
    methods = dict(methods) if isinstance(methods, tuple) else methods
    return jaxmoo.resolve_conflicts(methods, rule, stacked=STACKED, num_objectives=K)


def block_matrices(part, tree):
    """Per block the float64 matrix [K, n] of what belongs to it, and where it lies."""
    columns, where = [[] for _ in part.names], [[] for _ in part.names]
    for index, (x, numbers) in enumerate(zip(jax.tree.leaves(tree), part.labels, strict=True)):
        sections = np.asarray(x, np.float64).reshape(K, len(numbers), -1)
        for section, number in enumerate(numbers):
            columns[number].append(sections[:, section])
            where[number].append((index, section))
    return [np.concatenate(c, axis=1) for c in columns], where


def assert_trees_close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)
