"""Sketches keep inner products, to within what their size promises, and add up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoo.kernels.sketch import draws, sketch_sections


def matrix(key, n, m):
    """The map by its definition, [m, n]: rows of signed and rolled entries, added up."""
    h = m // 2
    (drawn,) = jax.device_get(jax.jit(lambda key: draws(key[None], [n], [1], h))(key))
    found = np.zeros((m, n))
    for i in range(n):
        row, column = divmod(i, h)
        bucket = 2 * ((column + drawn.offsets[0, row]) % h) + drawn.sums[0, row]
        found[bucket, i] = drawn.columns[0, column] * drawn.rows[0, row]
    return found


@functools.partial(jax.jit, static_argnums=2, static_argnames="platform")
def sketch(x, keys, m, platform=None):
    """Of one array [K, S, n]."""
    return sketch_sections([x], keys, m, platform=platform)[0]


@pytest.mark.parametrize("platform", ["cpu", "interpret", None])
@pytest.mark.parametrize(("n", "m"), [(1, 6), (37, 8), (64, 8), (50, 7), (20, 64)])
def test_it_is_one_linear_map_on_every_platform(platform, n, m):
    x = np.random.default_rng(0).normal(size=(3, 2, n)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 2)
    found = sketch(jnp.asarray(x), keys, m, platform=platform)
    for section in range(2):
        wanted = x[:, section] @ matrix(keys[section], n, m).T
        np.testing.assert_allclose(found[:, section], wanted, atol=1e-5)


def test_sections_have_their_own_draws_and_objectives_share_them():
    x = jnp.ones((2, 3, 100))
    first, second = sketch(x, jax.random.split(jax.random.key(0), 3), 16)
    np.testing.assert_array_equal(first, second)
    assert len({tuple(section) for section in first.tolist()}) == 3


@pytest.mark.parametrize("shape", [(40,), (6, 5), (50, 3, 2), (3, 20), (2, 40), (1,)])
def test_on_tpus_it_is_linear_too_and_right_on_average(shape):
    """Vectors, matrices of short and of long rows."""
    size, m, times = int(np.prod(shape)), 16, 3000
    keys = jax.random.split(jax.random.key(0), times)
    unit = jnp.eye(size).reshape(size, 1, *shape)

    def of(x, keys):
        each = lambda key: sketch(x, key[None], m, platform="interpret-tpu")[:, 0]  # noqa: E731
        return jax.lax.map(each, keys)

    maps = np.asarray(of(unit, keys[:2]), np.float64)  # [2, n, m]
    assert set(np.unique(maps)) <= {-1, 0, 1}
    assert (np.abs(maps).sum(2) == 1).all()
    x = np.random.default_rng(1).normal(size=(2, 1, *shape)).astype(np.float32)
    flat = x.reshape(2, -1).astype(np.float64)
    z = np.asarray(of(jnp.asarray(x), keys), np.float64)
    np.testing.assert_allclose(z[0], flat @ maps[0], atol=1e-5)
    found, exact = np.einsum("tkm,tlm->tkl", z, z), flat @ flat.T
    spread = found.std(0).max() / np.sqrt(times)
    np.testing.assert_allclose(found.mean(0), exact, atol=4 * spread + 1e-5)


@pytest.mark.parametrize("alike", [False, True], ids=["any gradients", "every row the same"])
def test_inner_products_are_right_on_average_and_vary_as_stated(alike):
    """Rows that are all the same meet their like at one offset in m, and must not add up."""
    m, rows, draws = 32, 40, 4000
    x = np.random.default_rng(1).normal(size=(2, 2 * rows, m // 2))
    x[1] += 0.5 * x[0]
    if alike:
        x[:] = x[:, :1]
    x = jnp.asarray(x.reshape(2, 1, -1), jnp.float32)
    keys = jax.random.split(jax.random.key(2), (draws, 1))
    z = jax.lax.map(lambda key: sketch(x, key, m, platform="interpret")[:, 0], keys)
    found = np.asarray(jnp.einsum("tkm,tlm->tkl", z, z), np.float64)
    exact = np.asarray(jnp.einsum("ksn,lsn->kl", x, x), np.float64)
    squares = np.diag(exact)
    variance = (squares[:, None] * squares + exact**2) / m
    np.testing.assert_allclose(found.mean(0), exact, atol=4 * np.sqrt(6 * variance.max() / draws))
    measured = found.var(0)
    if alike:  # with few rows besides, the stated bound is close
        assert (measured < 6 * squares[:, None] * squares / m).all()
    else:
        np.testing.assert_allclose(measured, variance, rtol=0.15)


def test_draws_do_not_depend_on_what_else_is_sketched():
    """A call of the engine sees a few arrays of those that a whole tree has."""
    x, y = jnp.ones((2, 3, 100)), jnp.ones((2, 2, 1000))
    keys = jax.random.split(jax.random.key(0), 5)
    both = jax.jit(lambda keys: sketch_sections([x, y], keys, 16))(keys)
    np.testing.assert_array_equal(both[0], sketch(x, keys[:3], 16))
    np.testing.assert_array_equal(both[1], sketch(y, keys[3:], 16))


def test_a_row_that_fits_is_kept_exactly():
    """Entries of one row, half as long as the sketch, do not meet."""
    x = np.random.default_rng(3).normal(size=(4, 1, 100)).astype(np.float32)
    z = sketch(jnp.asarray(x), jax.random.split(jax.random.key(0), 1), 200)[:, 0]
    np.testing.assert_allclose(z @ z.T, x[:, 0] @ x[:, 0].T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_and_harms_no_other(bad):
    x = np.ones((3, 1, 1000), np.float32)
    x[1, 0, 700] = bad
    z = sketch(jnp.asarray(x), jax.random.split(jax.random.key(0), 1), 64)[:, 0]
    assert np.isfinite(z).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_sums_are_formed_in_float32(dtype):
    x = jnp.full((1, 1, 2**14), 129 / 128, dtype)
    z = sketch(x, jax.random.split(jax.random.key(0), 1), 2)
    assert z.dtype == jnp.float32
    # Each sum is a whole number of entries, which takes more than 8 bits of mantissa.
    assert np.array_equal(np.asarray(z) * 128 % 129, np.zeros((1, 1, 2)))


def test_on_tpus_entries_that_are_heavy_in_several_arrays_meet_by_chance_only():
    """As the channels of a layer's norms are."""
    m, times = 32, 2000
    x = jnp.zeros((1, 1, 12)).at[..., 5].set(1.0)
    keys = jax.random.split(jax.random.key(0), (times, 2))

    def of(keys):
        return sum(sketch_sections([x, x], keys, m, platform="interpret-tpu"))

    z = np.asarray(jax.lax.map(of, keys))
    met = (np.abs(z).max(3) != 1).mean()
    np.testing.assert_allclose(met, 1 / m, atol=4 * np.sqrt(1 / m / times))
