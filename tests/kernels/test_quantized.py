"""Matrices in few bits: against the definition in float64, and products against the matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from jaxmoo.errors import ConfigError
from jaxmoo.kernels.product import product
from jaxmoo.kernels.quantized import NF4, dequantize, quantize, quantized_product

INPUTS, OUTPUTS = 192, 300  # blocks of three scales, and more columns than a strip has


def matrix(kind=np.float32):
    kernel = np.random.default_rng(0).standard_t(4, (OUTPUTS, INPUTS)).astype(np.float32)
    kernel[3, 64:128] = 0
    return kernel.astype(kind).T


def nf4_levels():
    """The levels by their definition: quantiles of a normal distribution, on both sides of 0."""
    end = 1 - (1 / 30 + 1 / 32) / 2
    above = norm.ppf(np.linspace(0.5, end, 9))
    below = norm.ppf(np.linspace(0.5, end, 8))
    return np.concatenate([-below[:0:-1], above]) / above[-1]


def by_definition(kernel, kind):
    """Dequantised values, and how far each weight is from being rounded the other way."""
    kernel = kernel.astype(np.float64)
    if kind == "int8":
        scales = np.abs(kernel).max(0) / 127
        steps = kernel / scales
        return np.rint(steps) * scales, np.abs(np.abs(steps - np.rint(steps)) - 0.5)
    blocks = kernel.reshape(-1, 64, kernel.shape[1])
    scales = np.abs(blocks).max(1, keepdims=True)
    levels = NF4.astype(np.float64)
    distance = np.abs(blocks / np.where(scales > 0, scales, 1) - levels[:, None, None, None])
    first, second = np.sort(distance, 0)[:2]
    nearest = (levels[distance.argmin(0)] * scales).reshape(kernel.shape)
    return nearest, (second - first).reshape(kernel.shape)


def test_the_levels_are_those_of_the_definition():
    np.testing.assert_allclose(NF4, nf4_levels(), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_every_weight_is_the_nearest_multiple_of_its_scale(kind, dtype):
    kernel = matrix(dtype)
    expected, margin = by_definition(kernel, kind)
    codes, scales = quantize(kernel, kind)
    found = dequantize(codes, scales)
    assert (codes.nbytes + scales.nbytes) * 8 / kernel.size == (
        4.5 if kind == "nf4" else 8 + 32 / INPUTS
    )
    sure = margin > 1e-5  # others may be rounded either way in float32
    assert sure.mean() > 0.99
    np.testing.assert_allclose(found[sure], expected[sure], rtol=1e-6)
    # As TPUs look levels up, they are the same.
    assert np.array_equal(dequantize(codes, scales, "interpret-tpu"), found)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_is_quantised_once_more_stays_as_it_is(kind):
    codes, scales = quantize(matrix(), kind)
    again, _ = quantize(np.asarray(dequantize(codes, scales)), kind)
    assert np.array_equal(again, codes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_and_their_gradients_are_those_of_the_matrix(dtype):
    codes, scales = quantize(matrix(), "nf4")
    kernel = dequantize(codes, scales).astype(dtype)
    x = jax.random.normal(jax.random.key(0), (2, 3, INPUTS), dtype)

    def both(times):
        y, back = jax.vjp(jax.vmap(times), x)  # over objectives, which share the matrix
        return y, back(jnp.cos(y))[0]

    found = jax.jit(lambda: both(lambda x: quantized_product(x, codes, scales, "cpu")))()
    expected = jax.jit(lambda: both(lambda x: product(x, kernel, "cpu")))()
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


def test_bad_input():
    with pytest.raises(ConfigError, match="int8 or nf4, found 'int4'"):
        quantize(matrix(), "int4")
    with pytest.raises(ConfigError, match=r"100 is no multiple of 64\. Use int8"):
        quantize(np.zeros((100, 8), np.float32), "nf4")
    _, scales = quantize(np.full((64, 1), np.nan), "nf4")
    assert np.isnan(scales).all()
