"""The kernel of Gram matrices, interpreted on the CPU, beside products in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoo.kernels.gpu_grams import grams_in_one_kernel

COLUMNS = 70_001  # enough for the kernel, and no multiple of its tiles


def draw(k: int, sections: int, columns: int) -> jnp.ndarray:
    random = np.random.default_rng(k)
    return jnp.asarray(random.normal(size=(k, sections, columns)), jnp.bfloat16)


@jax.jit
def kernel(arrays: list[jax.Array]) -> list[jax.Array]:
    return [x.sum(1) for x in grams_in_one_kernel(arrays, interpret=True)]


@pytest.mark.parametrize(
    "k", [5, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 8, 16, 20))]
)
def test_all_arrays_and_sections_are_multiplied(k):
    """Large ones, and small ones side by side; K fills up to a power of two."""
    arrays = [draw(k, 1, COLUMNS), draw(k, 2, COLUMNS), draw(k, 3, 7)]
    arrays.append(jnp.asarray(np.random.default_rng(k).normal(size=(k, 2, 300)), jnp.float32))
    for x, found in zip(arrays, kernel(arrays), strict=True):
        rows = np.asarray(x, np.float64)
        expected = np.einsum("isn,jsn->sij", rows, rows)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-5 * expected.max())


def test_a_row_that_is_not_finite_spoils_its_own_products_only():
    x = draw(3, 1, COLUMNS).at[1, 0, COLUMNS - 1].set(jnp.inf)
    (gram,) = kernel([x])
    bad = ~np.isfinite(gram[0])
    assert np.array_equal(bad, [[False, True, False], [True, True, True], [False, True, False]])


def test_gradients_of_other_precisions_are_left_to_the_compiler():
    x = draw(2, 1, COLUMNS).astype(jnp.float32)
    (gram,) = kernel([x])
    rows = np.asarray(x[:, 0], np.float64)
    np.testing.assert_allclose(gram[0], rows @ rows.T, atol=1e-5 * (rows**2).sum(1).max())


def test_any_number_of_arrays_takes_few_kernels():
    """A kernel's text grows with its arrays, not with their sections."""
    large = [jax.ShapeDtypeStruct((2, 30, COLUMNS), jnp.bfloat16)] * 14
    arrays = large + [jax.ShapeDtypeStruct((2, 1, 100), jnp.float32)] * 6
    program = str(jax.make_jaxpr(lambda *x: grams_in_one_kernel(x, interpret=True))(*arrays))
    assert program.count("pallas_call[") == 2
    assert program.count("dot_general[") == 20


def test_nothing_is_multiplied_to_nothing():
    assert grams_in_one_kernel([], interpret=True) == []
