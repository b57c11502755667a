"""What docs/sketches.md promises of `gram="sketch:N"`: only weights are estimated, and how well."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from closeness import relative_error
from jaxmoo import aggregators, resolve_conflicts
from jaxmoo.errors import ConfigError
from jaxmoo.resolver_state import seeded
from jaxmoo.sketched import is_small, sketch_size

K = 6
SHAPES = {"w": (100, 300), "b": (300,), "v": (120, 80)}
SMALL, LARGE = 256, 4096
DRAWS = 40
# Methods whose update is a continuous function of the Gram matrix. krum ranks gradients.
CONTINUOUS = [
    "unit_mean", "mgda", "cagrad", "pcgrad", "gradvac", "upgrad", "dualproj", "imtl_g",
    "aligned_mtl", "config", "nash_mtl", "fairgrad", "moco", "cr_mogm", "excess_mtl",
]  # fmt: skip


@functools.cache
def gradients():
    """Of norms 0.5 to 2.2; the last two oppose most others, and the mean."""
    rng = np.random.default_rng(0)
    along = np.array([0.8, 0.7, 0.6, 0.3, -0.5, -0.7])
    norms = np.array([1.0, 2.2, 0.7, 1.2, 0.5, 0.6])
    size = sum(map(math.prod, SHAPES.values()))
    common, own = rng.normal(size=size), rng.normal(size=(K, size))
    x = along[:, None] * common + np.sqrt(1 - along**2)[:, None] * own
    return cut(norms[:, None] * x / np.sqrt(size))


def cut(matrix):
    """Rows [K, n] as a tree of arrays [K, ...]."""
    ends = np.cumsum([math.prod(shape) for shape in SHAPES.values()])
    pieces = np.split(np.asarray(matrix), ends[:-1], axis=1)
    named = zip(SHAPES.items(), pieces, strict=True)
    return {name: np.float32(piece.reshape(-1, *shape)) for (name, shape), piece in named}


def rows(tree):
    """The other way round, in float64."""
    return np.concatenate([np.float64(x).reshape(len(x), -1) for x in tree.values()], axis=1)


def exact_gram(tree):
    return rows(tree) @ rows(tree).T


@functools.cache
def resolver(aggregator="mean", size=SMALL):
    """``(state, jitted update)``, all arrays in one block."""
    tx = resolve_conflicts(aggregator, "whole", num_objectives=K, gram=f"sketch:{size}")
    state = tx.init({name: jnp.zeros(shape) for name, shape in SHAPES.items()})
    return state, jax.jit(lambda updates, state, active: tx.update(updates, state, active=active))


def resolve(tree, active=None, state=None, **options):
    first, update = resolver(**options)
    active = np.ones(K, bool) if active is None else np.asarray(active)
    found, state = update(tree, first if state is None else state, active)
    return jax.device_get(found), jax.device_get(state)


@functools.cache
def estimates(size, heavy=False):
    """Gram matrices of many steps on the same gradients [DRAWS, K, K], and their stated errors."""
    tree = heavy_gradients() if heavy else gradients()
    found, state = [], None
    for _ in range(DRAWS):
        _, state = resolve(tree, state=state, size=size)
        found.append((state.gram[0], state.gram_error[0]))
    return tuple(np.stack(x) for x in zip(*found, strict=True))


def heavy_gradients():
    """The same, and a few entries that are most of every gradient."""
    tree = {name: x.copy() for name, x in gradients().items()}
    tree["w"][:, 17, ::50] += np.random.default_rng(1).normal(size=(K, 6))
    return tree


def root_mean_square(x):
    return np.sqrt(np.mean(np.square(x)))


def relative_norm(found, exact):
    """Frobenius norms of errors over that of the exact matrix."""
    return np.linalg.norm(found - exact, axis=(-2, -1)) / np.linalg.norm(exact)


# --- What is random ------------------------------------------------------------------------------


def test_sketches_are_fresh_at_every_step_and_by_seed_and_otherwise_repeat():
    _, first = resolve(gradients())
    _, second = resolve(gradients(), state=first)
    _, again = resolve(gradients())
    _, other = resolve(gradients(), state=seeded(resolver()[0], 5))
    np.testing.assert_array_equal(first.gram, again.gram)
    for different in (second, other):
        assert (different.gram != first.gram).all()


@functools.cache
def tiny_sketches():
    """Gram matrices of two blocks with the same gradients, from sketches of 4 numbers."""
    tx = resolve_conflicts("mean", "leaf", num_objectives=K, gram="sketch:4")
    alike = {name: np.float32(np.random.default_rng(0).normal(size=(K, 500))) for name in "ab"}
    _, state = jax.jit(tx.update)(alike, tx.init({name: jnp.ones(500) for name in "ab"}))
    return np.float64(state.gram)


def test_blocks_have_sketches_of_their_own():
    first, second = tiny_sketches()
    assert (first != second).all()


# --- What is exact -------------------------------------------------------------------------------


def test_the_combination_is_exact_and_its_weights_are_those_of_the_estimated_gram_matrix():
    found, state = resolve(gradients(), aggregator="cagrad")
    weights, _ = aggregators.weigh_blocks(aggregators.get("cagrad"), state.gram)
    np.testing.assert_allclose(state.weights, weights, atol=1e-5)
    combined = state.weights[0].astype(float) @ rows(gradients())
    flat = np.concatenate([found[name].ravel() for name in SHAPES])
    assert relative_error(flat, combined) < 1e-5


def test_the_mean_stays_the_mean():
    found, state = resolve(gradients())
    np.testing.assert_allclose(state.weights, np.full((1, K), 1 / K), rtol=1e-6)
    for name, x in gradients().items():
        np.testing.assert_allclose(found[name], x.mean(0), atol=1e-6)


# --- How good the Gram matrix is -----------------------------------------------------------------


def test_gram_matrices_are_right_on_average():
    found, _ = estimates(SMALL)
    exact = exact_gram(gradients())
    squares = np.diag(exact)
    spread = np.sqrt((squares[:, None] * squares + exact**2) / SMALL / DRAWS)
    assert (np.abs(found.mean(0) - exact) < 4 * spread).all()


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_the_error_is_what_the_trace_says_and_falls_as_one_over_the_root_of_n(size):
    exact = exact_gram(gradients())
    said = np.sqrt((np.trace(exact) ** 2 + np.sum(exact**2)) / size) / np.linalg.norm(exact)
    measured = root_mean_square(relative_norm(estimates(size)[0], exact))
    np.testing.assert_allclose(measured, said, rtol=0.25)


@pytest.mark.parametrize("heavy", [False, True], ids=["spread out", "few heavy entries"])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_the_stated_error_is_the_true_one_within_a_factor_of_two(size, heavy):
    """Few heavy entries, which seldom meet, must not be taken for an error."""
    exact = exact_gram(heavy_gradients() if heavy else gradients())
    found, said = estimates(size, heavy)
    true = relative_norm(found, exact)
    assert 0.5 < root_mean_square(said) / root_mean_square(true) < 2


def test_gram_matrices_are_positive_semidefinite_even_of_too_small_sketches():
    for gram in tiny_sketches():
        values = np.linalg.eigvalsh(gram)
        assert values[0] > -1e-6 * values[-1]
        assert (values > 1e-5 * values[-1]).sum() <= 4


def test_lengths_of_combinations_are_kept_to_the_root_of_k_over_n():
    """All of them at once: the largest distortion in the space of the gradients."""
    for size in (SMALL, LARGE):
        worst = [distortion(found) for found in estimates(size)[0]]
        typical = 2 * np.sqrt(K / size)
        assert 0.3 * typical < np.mean(worst) < typical
        assert max(worst) < 2 * typical


def distortion(found):
    """The largest relative change of a squared length, of combinations of the gradients."""
    half = np.linalg.inv(np.linalg.cholesky(exact_gram(gradients())))
    return np.abs(np.linalg.eigvalsh(half @ found @ half.T) - 1).max()


# --- What becomes of the methods' updates --------------------------------------------------------


@functools.cache
def solved(method):
    """Weights of two steps, from exact and from estimated Gram matrices of both sizes."""
    method = aggregators.get(method)
    scale = np.float32(np.geomspace(0.5, 2, K))  # the second step's gradients
    given = np.concatenate([estimates(SMALL)[0][:8], estimates(LARGE)[0][:8]])
    found = []
    for gram in (np.broadcast_to(np.float32(exact_gram(gradients())), given.shape), given):
        state = None
        for factor in (np.ones(K, np.float32), scale):
            weights, state = aggregators.weigh_blocks(
                method, gram * factor[:, None] * factor, state=state, key=jax.random.key(0)
            )
            found.append(np.float64(weights) * factor)
    return found[0], found[1], found[2], found[3]


def length(weights):
    return np.sqrt(np.einsum("bk,kl,bl->b", weights, exact_gram(gradients()), weights))


@pytest.mark.parametrize("method", CONTINUOUS)
def test_updates_approach_the_exact_ones(method):
    for wanted, found in zip(solved(method)[:2], solved(method)[2:], strict=True):
        error = length(found - wanted) / length(wanted)
        small, large = root_mean_square(error[:8]), root_mean_square(error[8:])
        # A sixteenth of N is four times the error.
        assert large < 0.5 * small or small < 1e-5
        assert large < 4 * np.sqrt(K / LARGE)


@pytest.mark.parametrize("method", ["mgda", "upgrad", "dualproj", "nash_mtl"])
def test_no_objective_is_opposed_by_more_than_the_distortion(method):
    """`<g_i, d> >= -e |g_i| |d|`: always for the worst e, mostly for that of 2 log K / N."""
    exact = exact_gram(gradients())
    _, _, weights, _ = solved(method)
    products = weights @ exact / np.sqrt(np.diag(exact)) / length(weights)[:, None]
    grams = np.concatenate([estimates(size)[0][:8] for size in (SMALL, LARGE)])
    worst = np.array([distortion(gram) for gram in grams])
    assert (products.min(1) > -worst - 1e-4).all()
    sizes = np.repeat([SMALL, LARGE], 8)
    mostly = products.min(1) > -np.sqrt(2 * math.log(K) / sizes)
    assert mostly.mean() > 0.8


def test_lengths_that_are_reported_are_estimates():
    _, state = resolve(gradients(), size=LARGE)
    wanted = np.linalg.norm(rows(gradients()).mean(0))
    np.testing.assert_allclose(state.mean_norm[0], wanted, rtol=4 / np.sqrt(2 * LARGE))
    assert state.mean_norm[0] != pytest.approx(wanted, rel=1e-6)


# --- Awkward gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_objective_that_is_not_finite_is_left_out_as_if_it_were_absent(bad):
    damaged = {name: x.copy() for name, x in gradients().items()}
    damaged["v"][2, 40, 7] = bad
    found, state = resolve(damaged, aggregator="cagrad")
    without, other = resolve(gradients(), active=np.arange(K) != 2, aggregator="cagrad")
    np.testing.assert_array_equal(state.skipped, np.arange(K) == 2)
    np.testing.assert_allclose(state.weights, other.weights, rtol=1e-5)
    for name in found:
        np.testing.assert_allclose(found[name], without[name], atol=1e-6)
    assert np.isfinite(state.gram_error).all() and (state.gram_error > 0).all()


@pytest.mark.parametrize("power", [83, -83], ids=["1e25", "1e-25"])
def test_gradients_whose_squares_leave_the_range_of_numbers_are_resolved_as_others(power):
    scaled = {name: np.ldexp(x, power) for name, x in gradients().items()}
    found, state = resolve(scaled, aggregator="cagrad")
    usual, other = resolve(gradients(), aggregator="cagrad")
    np.testing.assert_allclose(state.weights, other.weights, rtol=1e-5)
    np.testing.assert_allclose(state.gram_error, other.gram_error, rtol=1e-5)
    for name in found:
        np.testing.assert_allclose(np.ldexp(found[name], -power), usual[name], atol=1e-6)


def test_bfloat16_gradients_are_sketched_in_float32():
    rounded = {name: x.astype(jnp.bfloat16) for name, x in gradients().items()}
    found, state = resolve(rounded)
    _, other = resolve({name: np.float32(x) for name, x in rounded.items()})
    assert {str(x.dtype) for x in found.values()} == {"bfloat16"}
    np.testing.assert_allclose(state.gram, other.gram, rtol=1e-5, atol=1e-5)


def test_float64_gradients_are_sketched_in_float64():
    """One row is kept exactly, to the type's rounding."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 50)))
        tx = resolve_conflicts("mean", "whole", gram="sketch:128")
        _, state = jax.jit(tx.update)(x, tx.init(x[0]))
        wanted = float(jnp.linalg.norm(x.mean(0)))
        # The state is float32: what it was made with.
        assert float(state.mean_norm[0]) == pytest.approx(wanted, rel=1e-7)


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("gram", ["sketch", "sketch:", "sketch:1", "sketch:-4", "skecth:5", "none"])
def test_an_unknown_gram_is_refused_with_an_example(gram):
    with pytest.raises(ConfigError, match=r"expected 'exact' or 'sketch:N'.*'sketch:16384'"):
        resolve_conflicts("mean", gram=gram)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("graddrop", "coordinate by coordinate"),
        ("trimmed_mean", "coordinate by coordinate"),
        ("sdmgrad", "two batches"),
        ("modo", "two batches"),
    ],
)
def test_methods_that_cannot_take_an_estimate_are_refused_with_the_reason(method, reason):
    with pytest.raises(ConfigError, match=f"{method} .*{reason}.*gram='exact'"):
        resolve_conflicts({"^a": "mean", ".*": method}, num_objectives=2, gram="sketch:64")


def test_every_other_method_is_refused_or_reads_no_gram_matrix_or_is_krum():
    refused = {"graddrop", "trimmed_mean", "sdmgrad", "modo"}
    exact = {"mean", "sum", "constant", "random"}  # read no Gram matrix
    assert {*CONTINUOUS, *refused, *exact, "krum"} == set(aggregators.names())


def test_a_sketch_is_small_below_a_hundred_numbers_per_objective():
    assert [is_small(100 * k, k) for k in (2, 8, 64)] == [False] * 3
    assert [is_small(100 * k - 1, k) for k in (2, 8, 64)] == [True] * 3
    assert sketch_size("exact") is None
    assert sketch_size("sketch:4096") == 4096
