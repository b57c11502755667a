"""Properties at given ranks and at points that are Pareto stationary or nearly so.

The matrices and most of the properties are those that another library's suite asks of its
aggregators, written anew; in float32 and in float64.

A matrix is *strongly stationary* if some ``w > 0`` has ``J^T w = 0``, and *weakly* if some
``w >= 0``, not 0, has. The update of a method that projects on the cone of non-conflicting
directions vanishes at the first only, that of ``mgda`` at both.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from aggregators import families
from aggregators.families import VARIANTS, apply_rule, combine, in_batches
from jaxmoo import aggregators

pytestmark = pytest.mark.slow

SHAPES = ((1, 1, 1), (4, 3, 1), (4, 3, 2), (4, 3, 3), (9, 11, 5), (9, 11, 9))  # rows, columns, rank
STATIONARY_SHAPES = ((5, 3, 3), (9, 11, 6), (7, 13, 2))
SCALES = (0.0, 1e-10, 1e3, 1e5, 1e10, 1e15)
K, N = 9, 13
SEEDS = range(4)


def basis(first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Orthonormal columns, of which the first are those of ``first``, up to sign."""
    rows, given = first.shape
    return np.linalg.qr(np.hstack([first, rng.standard_normal((rows, rows - given))]))[0]


def matrix(left: np.ndarray, columns: int, rng: np.random.Generator) -> np.ndarray:
    """One with given left singular vectors and random other factors."""
    rank = left.shape[1]
    right = basis(np.zeros((columns, 0)), rng)[:, :rank]
    return left * np.abs(rng.standard_normal(rank)) @ right.T


def of_rank(m: int, n: int, rank: int, rng: np.random.Generator) -> np.ndarray:
    return matrix(basis(np.zeros((m, 0)), rng)[:, :rank], n, rng)


def strongly_stationary(m: int, n: int, rank: int, rng: np.random.Generator) -> np.ndarray:
    null = np.abs(rng.standard_normal((m, 1)))
    return matrix(basis(null, rng)[:, 1 : rank + 1], n, rng)


def only_weakly_stationary(m: int, n: int, rank: int, rng: np.random.Generator) -> np.ndarray:
    """Some rows are stationary among themselves; every other combination has a component left."""
    among = rng.permutation(m) < rng.integers(2, m)
    positive = np.abs(rng.standard_normal(m))
    halves = np.stack([np.where(among, positive, 0), np.where(among, 0, positive)], axis=1)
    return matrix(basis(halves, rng)[:, 1 : rank + 1], n, rng)


def not_stationary(m: int, n: int, rank: int, rng: np.random.Generator) -> np.ndarray:
    positive = np.abs(rng.standard_normal((m, 1)))
    return matrix(basis(positive, rng)[:, :rank], n, rng)


@functools.cache
def typical(dtype: str) -> tuple[list[str], np.ndarray]:
    """Kinds and matrices ``[M, K, N]``, padded with zeros, of all kinds but the scaled ones."""
    kinds, matrices = [], []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        for make, shapes in (
            (of_rank, SHAPES),
            (strongly_stationary, STATIONARY_SHAPES),
            (only_weakly_stationary, STATIONARY_SHAPES),
            (not_stationary, STATIONARY_SHAPES),
        ):
            for m, n, rank in shapes:
                kinds.append(make.__name__)
                matrices.append(np.pad(make(m, n, rank, rng), ((0, K - m), (0, N - n))))
    return kinds, np.stack(matrices).astype(dtype).astype(np.float64)


METHODS = {
    **{name: VARIANTS[name] for name in aggregators.names()},
    "constant": aggregators.constant(np.arange(1.0, K + 1)),
    "cagrad 2": aggregators.cagrad(2.0),
}
del METHODS["cr_mogm"]  # at its first step it is mgda
SOLVED = (
    *("mgda", "cagrad", "cagrad 2", "upgrad", "dualproj", "imtl_g", "aligned_mtl", "config"),
    *("nash_mtl", "fairgrad", "pcgrad", "gradvac"),
)
# In float64 those that solve something; the others have their promises in test_float64.py.
CASES = [
    (name, dtype)
    for dtype in ("float32", "float64")
    for name in METHODS
    if dtype == "float32" or name in SOLVED
]


def resolve(name: str, dtype: str, stack: np.ndarray) -> np.ndarray:
    """Updates ``[M, N]``; rows of zeros are absent."""
    return both(name, dtype, stack)[0]


def both(name: str, dtype: str, stack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Updates ``[M, N]``, formed in the gradients' precision, and weights ``[M, K]``."""
    method = METHODS[name]
    if method.combine is not None:
        weights = np.full(stack.shape[:2], np.nan)
        updates = apply_rule(method, stack, dtype=dtype)
    else:
        weights, _ = families.resolve(method, stack, dtype=dtype)
        with families.precision(dtype):
            updates = in_batches(combine, stack.astype(dtype), weights.astype(dtype))
    assert updates.dtype == dtype
    return updates.astype(np.float64), weights


def worst_loss(updates: np.ndarray, stack: np.ndarray) -> np.ndarray:
    """Most that a step takes from an objective, relative to the gradients' norms, ``[M]``."""
    norms = np.linalg.norm(stack, axis=2)
    gains = np.einsum("mkn,mn->mk", stack, updates) / np.where(norms > 0, norms, 1)
    return -gains.min(1) / (norms.sum(1) / np.maximum((norms > 0).sum(1), 1))


PRECISIONS = pytest.mark.parametrize("dtype", ["float32", "float64"])
# Relative to the gradients. In float32 the Gram matrix of nearly stationary gradients knows lengths
# to the root of its rounding only.
ROUNDING = {"float32": 1e-3, "float64": 1e-6}


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_updates_are_finite_at_every_rank_and_scale(name, dtype):
    _, stack = typical(dtype)
    ranks = np.resize(stack[: len(SHAPES)], stack.shape)
    for scaled in (stack, *(ranks * scale for scale in SCALES)):
        assert np.isfinite(resolve(name, dtype, scaled)).all()


@PRECISIONS
@pytest.mark.parametrize("name", ["mgda", "upgrad", "dualproj", "nash_mtl", "fairgrad", "cagrad 2"])
def test_no_objective_is_opposed(name, dtype):
    """By ``cagrad``, where c is at least 1: no direction need be left in a smaller ball."""
    _, stack = typical(dtype)
    assert worst_loss(resolve(name, dtype, stack), stack).max() <= ROUNDING[dtype]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [c for c in CASES if not METHODS[c[0]].stochastic and c[0] != "constant"],
)
def test_rows_may_be_permuted(name, dtype):
    kinds, stack = typical(dtype)
    updates = resolve(name, dtype, stack)
    size = np.linalg.norm(stack, axis=2).max(1)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(K)
        error = np.abs(resolve(name, dtype, stack[:, order]) - updates).max(1) / size
        for kind, rows, value in zip(kinds, np.any(stack, axis=2).sum(1), error, strict=True):
            # Without a common direction the bargain has no solution and the best worst case many.
            # Of those cagrad may find any; that they oppose nobody is tested above.
            undecided = name in ("nash_mtl", "fairgrad") or name.startswith("cagrad")
            if undecided and kind == "only_weakly_stationary":
                continue
            if name == "krum" and rows < 5:  # ties go to the first
                continue
            assert value <= ROUNDING[dtype], (kind, rows)


@PRECISIONS
@pytest.mark.parametrize("name", ["mean", "upgrad"])
def test_scaling_rows_is_linear(name, dtype):
    """Each objective's pull is proportional to its own gradient."""
    _, stack = typical(dtype)
    rng = np.random.default_rng(0)
    first, second = rng.uniform(0, 1, (2, len(stack), K, 1))
    a, b = rng.uniform(0, 1, 2)
    parts = [resolve(name, dtype, scales * stack) for scales in (first, second)]
    whole = resolve(name, dtype, (a * first + b * second) * stack)
    error = np.abs(whole - a * parts[0] - b * parts[1]).max(1)
    assert (error / np.linalg.norm(stack, axis=2).max(1)).max() <= ROUNDING[dtype]


@PRECISIONS
@pytest.mark.parametrize("name", ["mgda", "upgrad", "dualproj"])
def test_updates_vanish_where_no_direction_is_left_and_only_there(name, dtype):
    kinds, stack = typical(dtype)
    norms = np.linalg.norm(stack, axis=2).max(1)
    lengths = np.linalg.norm(resolve(name, dtype, stack), axis=1) / norms
    nothing = {"strongly_stationary"} | ({"only_weakly_stationary"} if name == "mgda" else set())
    for kind, length in zip(kinds, lengths, strict=True):
        if kind in nothing:
            assert length <= ROUNDING[dtype], kind
        elif kind != "of_rank":
            assert length > 1e-3, kind


@PRECISIONS
def test_two_projections_of_pcgrad_are_upgrad(dtype):
    _, stack = typical(dtype)
    pairs = np.where(np.arange(K)[:, None] < 2, stack, 0.0)
    error = resolve("pcgrad", dtype, pairs) - resolve("upgrad", dtype, pairs)
    bound = {"float32": 1e-5, "float64": 1e-13}[dtype]
    assert (np.abs(error).max(1) / np.linalg.norm(pairs, axis=2).max(1)).max() <= bound


@PRECISIONS
@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_what_is_left_at_stationary_points_of_low_rank_is_as_little_as_the_page_says(name, dtype):
    """Relative to the terms that cancel, whose sum may be hundreds of times the mean gradient."""
    count, rng = len(typical(dtype)[0]), np.random.default_rng(0)
    for _ in range(5):
        made = [strongly_stationary(5, 3, 3, rng) for _ in range(count)]
        stack = np.pad(np.stack(made).astype(dtype), ((0, 0), (0, K - 5), (0, N - 3)))
        stack = stack.astype(np.float64)
        _, weights = both(name, dtype, stack)
        left = np.linalg.norm(np.einsum("mk,mkn->mn", weights, stack), axis=1)
        terms = np.einsum("mk,mk->m", weights, np.linalg.norm(stack, axis=2))
        assert (left / terms).max() <= {"float32": 7e-4, "float64": 1e-11}[dtype]
