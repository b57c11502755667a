"""The TPU's kernel of Gram matrices, interpreted on the CPU, beside products in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoo.kernels.tpu_grams import tpu_gram

kernel = jax.jit(functools.partial(tpu_gram, interpret=True))


def draw(*shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), dtype)


@pytest.mark.parametrize(
    "shape",
    [
        (3, 2, 136, 384),  # the last rows fill half a register
        *(
            pytest.param(shape, marks=pytest.mark.slow)
            for shape in ((8, 1, 2100, 128), (5, 1, 32, 1024))  # several blocks, one
        ),
    ],
)
def test_every_pair_of_rows_is_multiplied(shape):
    x = draw(*shape)
    rows = np.asarray(x, np.float64).reshape(*shape[:2], -1)
    expected = np.einsum("isn,jsn->sij", rows, rows)
    size = np.diagonal(expected, axis1=1, axis2=2).max()
    assert np.abs(np.asarray(kernel(x), np.float64) - expected).max() < 3e-6 * size


def test_a_row_that_is_not_finite_spoils_its_own_products_only():
    x = draw(3, 1, 136, 128).at[1, 0, 135, 3].set(jnp.inf)
    finite = np.isfinite(np.asarray(kernel(x)[0]))
    assert finite.tolist() == [[True, False, True], [False] * 3, [True, False, True]]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 1, 256, 128), jnp.float32),
        ((9, 1, 256, 128), jnp.bfloat16),
        ((2, 1, 256, 120), jnp.bfloat16),
        ((2, 1, 40000), jnp.bfloat16),
        ((2, 1, 16, 128), jnp.bfloat16),
    ],
)
def test_what_does_not_suit_the_kernel_is_left_to_the_compiler(shape, dtype):
    x = jax.ShapeDtypeStruct(shape, dtype)
    assert "pallas_call[" not in str(jax.make_jaxpr(kernel)(x))
