"""Products in half precision: the numbers of any device, in the form that CPUs compute fast."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from closeness import relative_error
from jaxmoo.kernels.product import product

ROUNDING = 2**-8  # of bfloat16


def draw(*shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    ]


def on_a_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return product(x, kernel, "cpu")


def gradients(x: jax.Array, kernel: jax.Array, ct: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Per language of the activations' leading axis."""
    return jax.vmap(lambda x, ct: jax.vjp(on_a_cpu, x, kernel)[1](ct))(x, ct)


rounded, compiled_gradients = jax.jit(on_a_cpu), jax.jit(gradients)


def test_a_bfloat16_product_is_the_exact_one_rounded_once():
    x, kernel = draw((2, 3, 500), (500, 7))
    found = rounded(x, kernel)
    assert found.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    assert np.allclose(np.asarray(found, np.float64), exact, rtol=ROUNDING, atol=1e-4)


@pytest.mark.slow
def test_every_language_has_its_own_gradient_of_the_shared_matrix():
    x, kernel, ct = draw((4, 2, 9, 6), (6, 5), (4, 2, 9, 5))
    dx, dkernel = compiled_gradients(x, kernel, ct)
    assert dx.dtype == dkernel.dtype == jnp.bfloat16
    x, kernel, ct = (np.asarray(a, np.float64) for a in (x, kernel, ct))
    assert relative_error(dx, ct @ kernel.T) < ROUNDING
    assert relative_error(dkernel, np.einsum("lbsi,lbso->lio", x, ct)) < ROUNDING


def test_cpus_get_plain_bfloat16_matrices_with_float32_results():
    """Anything else is turned into float32 before it is multiplied."""
    x, kernel, ct = draw((4, 2, 9, 6), (6, 5), (4, 2, 9, 5))
    program = str(jax.make_jaxpr(gradients)(x, kernel, ct))
    products = re.findall(r":(\w+)\[[\d,]*\] = dot_general\[\n(.*?)\n *\] ", program, re.DOTALL)
    assert len(products) >= 3  # forward, and of activations and matrix; repeats may be left out
    for result, parameters in products:
        assert result == "f32"
        assert re.search(r"dimension_numbers=\(\(\[\d\], \[\d\]\), \(\[\], \[\]\)\)", parameters)


def test_single_precision_is_left_alone():
    x, kernel, ct = (a.astype(jnp.float32) for a in draw((4, 2, 9, 6), (6, 5), (4, 2, 9, 5)))
    dx, dkernel = compiled_gradients(x, kernel, ct)
    assert rounded(x, kernel).dtype == dx.dtype == dkernel.dtype == jnp.float32
    assert (
        relative_error(dkernel, np.einsum("lbsi,lbso->lio", np.float64(x), np.float64(ct))) < 1e-6
    )
