"""What resolving block by block keeps of the whole, and what it loses."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from aggregators.families import families, weigh
from jaxmoo import aggregators

RNG = np.random.default_rng(0)
J = families(4, 32, 5)["random"] + 0.3 * RNG.standard_normal(32)


def by_blocks(name: str, j: np.ndarray, blocks: int) -> np.ndarray:
    """Each block of equally many columns resolved on its own, put together again."""
    pieces = np.stack(np.split(j, blocks, axis=1)).astype(np.float32)
    grams = np.einsum("bkn,bln->bkl", pieces, pieces)
    weights = weigh(name, grams, np.ones(grams.shape[:2], bool))
    return np.einsum("bk,bkn->bn", weights, pieces).reshape(-1)


@pytest.mark.parametrize("name", ["mean", "sum"])
def test_the_mean_does_not_see_blocks(name):
    """Also when a gradient is zero in some of them."""
    j = J.copy()
    j[1, :8] = 0.0
    for blocks in (2, 8, 32):
        np.testing.assert_allclose(
            by_blocks(name, j, blocks), by_blocks(name, j, 1), rtol=1e-5, atol=1e-6
        )


def test_one_block_is_the_whole_model():
    whole = jax.jit(lambda j: aggregators.aggregate("cagrad", j))(J.astype(np.float32))
    np.testing.assert_allclose(by_blocks("cagrad", J, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mgda", "upgrad", "dualproj", "nash_mtl"])
@pytest.mark.parametrize("blocks", [2, 8])
def test_non_conflict_is_kept(name, blocks):
    d = by_blocks(name, J, blocks)
    norms = np.linalg.norm(J, axis=1)
    assert (J @ d / norms).min() >= -1e-5 * norms.max()


@pytest.mark.parametrize("blocks", [2, 8])
def test_mgdas_improvement_is_kept(blocks):
    """``<g_i, d> >= |d|^2`` for every i: the sum of the blocks' inequalities."""
    d = by_blocks("mgda", J, blocks)
    assert (J @ d).min() >= d @ d * (1 - 1e-5)


@pytest.mark.parametrize("blocks", [2, 8])
def test_cagrads_ball_is_kept(blocks):
    d = by_blocks("cagrad", J, blocks) * 1.5
    mean = J.mean(0)
    assert np.linalg.norm(d - mean) <= 0.5 * np.linalg.norm(mean) * (1 + 1e-4)


def test_stationary_in_every_block_is_not_pareto_stationary():
    """Two scalar blocks stall where a common descent direction exists."""
    j = np.array([[1.0, 1.0], [-1.0, -2.0]])
    np.testing.assert_allclose(by_blocks("mgda", j, 2), 0, atol=1e-6)
    d = by_blocks("mgda", j, 1)
    assert (j @ d).min() > 0.05


def test_finer_blocks_shorten_mgdas_update():
    """So compare granularities at matched norms."""
    rng = np.random.default_rng(0)
    j = rng.standard_normal((8, 256)) + 1.0
    lengths = [np.linalg.norm(by_blocks("mgda", j, blocks)) for blocks in (1, 8, 64)]
    assert lengths[0] > lengths[1] > lengths[2]
    assert lengths[2] < 0.8 * np.linalg.norm(j.mean(0))
