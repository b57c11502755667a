"""The two passes over the gradients agree with float64 NumPy, without copies of the gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jaxmoo.kernels.reductions import (
    gram_parts,
    rows_of,
    scaled_grams,
    section_grams,
    weighted_sum,
)

SHAPES = [(3, 1, 5), (8, 4, 40_000), (2, 3, 16_384), (1, 2, 7), (4, 6), (3, 2, 5, 7)]


@pytest.mark.parametrize("partitioned", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_forms_equal_float64(dtype, partitioned):
    """Over all shapes, one compiled function for all of them."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in SHAPES]
    weights = [rng.uniform(size=shape[1::-1]).astype(np.float32) for shape in SHAPES]

    @jax.jit
    def both(arrays, weights):
        grams = [section_grams([x], partitioned=partitioned)[0] for x in arrays]
        sums = [
            [weighted_sum(x, w, partitioned=partitioned, many=many) for many in (False, True)]
            for x, w in zip(arrays, weights, strict=True)
        ]
        return grams, sums

    precision = 1e-6 if dtype == jnp.float32 else 2**-8
    for x, w, found, results in zip(arrays, weights, *both(arrays, weights), strict=True):
        exact = np.asarray(x, np.float64).reshape(*x.shape[:2], -1)
        grams = np.einsum("ksn,jsn->skj", exact, exact)
        atol = 1e-5 * np.abs(grams).max()
        np.testing.assert_allclose(found, grams, rtol=1e-5, atol=atol, err_msg=str(x.shape))
        total = np.einsum("sk,ksn->sn", np.float64(w), exact).reshape(x.shape[1:])
        for result in results:
            assert result.dtype == dtype
            np.testing.assert_allclose(
                np.asarray(result, np.float64),
                total,
                rtol=precision,
                atol=precision,
                err_msg=str(x.shape),
            )


@pytest.mark.parametrize("partitioned", [False, True])
def test_scaled_products_do_not_leave_float32s_range(partitioned):
    """In several pieces of columns, and what is left over."""
    x, y = (jax.random.normal(jax.random.key(i), (3, 2, 400_000)) * 1e20 for i in range(2))
    scale = jnp.array([1e-20, 2e-20])
    exact = [np.asarray(z, np.float64) * np.asarray(scale, np.float64)[:, None] for z in (x, y)]
    scaled = functools.partial(scaled_grams, partitioned=partitioned)
    products = jax.jit(lambda x, y: (scaled(x, scale), scaled(x, scale, y)))(x, y)
    for other, found in enumerate(products):
        wanted = np.einsum("isn,jsn->sij", exact[0], exact[other])
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("partitioned", [False, True])
def test_what_is_not_finite_stays_with_its_objective(partitioned):
    x = jnp.ones((3, 2, 4)).at[1, 0, 2].set(jnp.nan).at[1, 1, 0].set(jnp.inf)
    grams = np.asarray(section_grams([x], partitioned=partitioned)[0])
    kept = np.ix_([0, 1], [0, 2], [0, 2])
    assert np.array_equal(grams[kept], np.full((2, 2, 2), 4.0))
    assert not np.isfinite(grams[:, 1]).any()
    weights = jnp.array([[0.5, 0.0, 0.5], [1.0, 0.0, 0.0]])
    assert np.array_equal(weighted_sum(x, weights, partitioned=partitioned), np.ones((2, 4)))


def test_rows_are_chosen_exactly_and_what_is_not_finite_spoils_no_other():
    x = np.array([[0.1, np.nan], [np.inf, 3e38], [1e-30, -7.0]], np.float32)
    rows = [np.array([2, 0, 2, 1]), np.array([1])]
    for some, found in zip(rows, rows_of(jnp.asarray(x), [*map(jnp.asarray, rows)]), strict=True):
        wanted = np.where(np.isfinite(x), x, np.nan)[some]
        assert np.array_equal(found, wanted, equal_nan=True)


@pytest.mark.parametrize(("dtype", "copies"), [(jnp.float32, 0), (jnp.bfloat16, 1)])
def test_float32_gradients_are_not_copied_and_16_bits_never_widened(dtype, copies):
    x = jax.ShapeDtypeStruct((8, 4, 5_000_000), dtype)
    weights = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    size = 8 * 4 * 5_000_000 * jnp.dtype(dtype).itemsize
    for function, arguments in ((section_grams, ([x],)), (weighted_sum, (x, weights))):
        compiled = jax.jit(lambda *a, f=function: f(*a, partitioned=False)).lower(*arguments)
        temporary = compiled.compile().memory_analysis().temp_size_in_bytes
        assert temporary < (copies + 0.05) * size


@pytest.mark.slow
def test_arrays_of_any_shape_are_taken_at_once_and_mapped_and_differentiated():
    shapes = [(4, 3, 9_001), (4, 1, 600), (4, 2, 70, 3), (4, 1, 100_003)]
    arrays = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    forms = [functools.partial(section_grams, partitioned=form) for form in (False, True)]
    at_once, expected = jax.jit(lambda arrays: [form(arrays) for form in forms])(arrays)
    for found, wanted in zip(at_once, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-2)

    def first(x, partitioned=False):
        return section_grams([x], partitioned=partitioned)[0]

    x = arrays[0]

    @jax.jit
    def both(x):
        slopes = [
            jax.grad(lambda x, form=form: first(x, partitioned=form)[:, 0, 1].sum())(x)
            for form in (False, True)
        ]
        return jax.vmap(first)(jnp.stack([x, 2 * x])), slopes

    mapped, (slope, wanted) = both(x)
    np.testing.assert_allclose(mapped[1], 4 * expected[0], rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(slope, wanted, rtol=1e-6)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_there_is_no_kernel_where_the_compiler_divides(platform):
    """It cannot divide one, and on GPUs would gather all gradients for it."""
    x = jax.ShapeDtypeStruct((2, 1, 256, 128), jnp.bfloat16)

    def grams(x):
        return gram_parts([x], partitioned=False, platform=platform)

    for size, kernels in ((2, 0), (1, 1)):
        with jax.sharding.use_abstract_mesh(AbstractMesh((size,), ("tensor",))):
            program = str(jax.make_jaxpr(lambda x: grams(x))(x))
        assert program.count("pallas_call[") == kernels
