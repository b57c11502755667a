"""Matrices of gradients with a named structure, and the compiled path all property tests share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoo import aggregators
from jaxmoo.aggregators import Aggregator, combine_block

K, N = 6, 16
KEY = jax.random.key(7)


def families(k: int = K, n: int = N, seed: int = 0) -> dict[str, np.ndarray]:
    """One ``[k, n]`` matrix of every family, in float64 but exact in float32."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    spread = rng.permutation(np.geomspace(1, 1000, k))[:, None]
    common, low = normal(n), normal((k, max(1, k // 2))) @ normal((max(1, k // 2), n))
    random = normal((k, n))
    duplicates = np.repeat(normal(((k + 1) // 2, n)), 2, axis=0)[:k]
    signs = np.where(np.arange(k) % 2, -1.0, 1.0)[:, None]
    made = {
        "random": random,
        "correlated": 0.3 * normal((k, n)) + common,
        "imbalanced": random * spread,
        "imbalanced correlated": (0.3 * normal((k, n)) + common) * spread,
        "low-rank": low,
        "imbalanced low-rank": low * spread,
        "duplicates": duplicates,
        "zero-row": np.where(np.arange(k)[:, None] == k // 2, 0.0, random),
        "opposed": signs * common,
        "nearly opposed": signs * common + 0.05 * normal((k, n)),
        "equal": np.tile(common, (k, 1)),
        "single-row": np.where(np.arange(k)[:, None] == k // 2, random, 0.0),
        "all-zero": np.zeros((k, n)),
    }
    return {name: j.astype(np.float32).astype(np.float64) for name, j in made.items()}


NAMES = tuple(families())
SEEDS = (0, 1)
LABELS = tuple((name, seed) for seed in SEEDS for name in NAMES)
# [M, K, N], one of every family for every seed.
STACK = np.stack([families(seed=seed)[name] for name, seed in LABELS])

# Every method with default options, and the options that change the mathematics.
VARIANTS: dict[str, Aggregator] = {
    **{
        name: aggregators.get(name)
        for name in aggregators.names()
        if name not in ("constant", "sdmgrad", "modo")
    },
    "constant": aggregators.constant(np.arange(1.0, K + 1) / np.arange(1.0, K + 1).sum()),
    "sdmgrad": aggregators.sdmgrad(),
    "modo": aggregators.modo(),
    "mgda l2": aggregators.mgda(normalisation="l2"),
    "cagrad 0.9": aggregators.cagrad(0.9),
    "aligned_mtl median": aggregators.aligned_mtl(scale="median"),
    "aligned_mtl rmse": aggregators.aligned_mtl(scale="rmse"),
    "config sum": aggregators.config(reduction="sum"),
    "fairgrad 2": aggregators.fairgrad(2.0),
    "fairgrad 0.5": aggregators.fairgrad(0.5),
    "fairgrad published": aggregators.fairgrad(2.0, scale="published"),
    "nash_mtl published": aggregators.nash_mtl(scale="published"),
    "krum 2": aggregators.krum(n_byzantine=0, n_selected=2),
}


# Matrices per call, and objectives of each. What is smaller is filled up with empty blocks and
# absent objectives, so that every method is compiled once for each precision.
_AT_ONCE, _MOST = 30, 9


@functools.cache
def compiled(method: Aggregator, dtype: str):
    """``(grams [M, K, K], active [M, K], preference [K], key) -> weights``."""
    if method.importance is not None:
        fill = (0.0,) * (_MOST - len(method.importance))
        method = dataclasses.replace(method, importance=method.importance + fill)

    @jax.jit
    def weigh(grams, active, preference, key):
        return aggregators.weigh_blocks(
            method, grams, active=active, preference=preference, key=key
        )[0]

    return weigh


@functools.cache
def compiled_rule(method: Aggregator):
    """``(stack [M, K, N], active [M, K]) -> updates`` of a coordinate-wise rule."""
    return jax.jit(jax.vmap(lambda j, active: combine_block(method, j, key=KEY, active=active)))


grams = jax.jit(jax.vmap(aggregators.gram))
combine = jax.jit(jax.vmap(aggregators.combine_rows))


def in_batches(function: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """A function of batches of one size, applied to as many matrices as there are."""
    count = len(arrays[0])
    pieces = []
    for start in range(0, count, _AT_ONCE):
        batch = [x[start : start + _AT_ONCE] for x in arrays]
        fill = _AT_ONCE - len(batch[0])
        batch = [np.pad(x, [(0, fill), *[(0, 0)] * (x.ndim - 1)]) for x in batch]
        pieces.append(np.asarray(function(*batch)))
    return np.concatenate(pieces)[:count]


def filled(product: np.ndarray) -> jax.Array:
    """A Gram matrix with the absent objectives of those that are compiled, for the same draws."""
    return jnp.asarray(np.pad(product, (0, _MOST - len(product))), jnp.float32)


def precision(dtype: Any) -> contextlib.AbstractContextManager[Any]:
    """Float64 has to be asked for."""
    return jax.enable_x64(jnp.dtype(dtype) == np.float64)


def weigh(
    name: str | Aggregator,
    products: np.ndarray,
    active: np.ndarray,
    preference: np.ndarray | None = None,
    dtype: Any = np.float32,
) -> np.ndarray:
    """Weights ``[M, K]``, float64, of Gram matrices ``[M, K, K]``."""
    method = VARIANTS[name] if isinstance(name, str) else name
    dtype = jnp.dtype(dtype)
    program = compiled(method, dtype.name)
    count = products.shape[1]
    fill = (0, _MOST - count)
    share = np.pad(np.ones(count) if preference is None else preference, fill)
    with precision(dtype):
        weights = in_batches(
            lambda g, a: program(g, a, jnp.asarray(share, dtype), KEY),
            np.pad(np.asarray(products, dtype), ((0, 0), fill, fill)),
            np.pad(active, ((0, 0), fill)),
        )
    assert weights.dtype == dtype
    return weights[:, :count].astype(np.float64)


def resolve(
    name: str | Aggregator,
    stack: np.ndarray,
    *,
    active: np.ndarray | None = None,
    preference: np.ndarray | None = None,
    dtype: Any = jnp.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``[M, K]`` and updates ``[M, N]`` of many matrices, float64.

    Without ``active``, a zero row is absent, as for a matrix on its own. Updates are formed in
    float64 from the weights, so that only the weights' errors show.
    """
    dtype = jnp.dtype(dtype)
    if stack is STACK and active is None and preference is None:
        return _of_families(name, dtype)
    return _resolve(name, np.asarray(stack, np.float64), active, preference, dtype)


@functools.cache
def _of_families(name: str | Aggregator, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """What most tests ask for; not to be written to."""
    found = _resolve(name, STACK, None, None, dtype)
    for x in found:
        x.flags.writeable = False
    return found


def _resolve(
    name: str | Aggregator,
    stack: np.ndarray,
    active: np.ndarray | None,
    preference: np.ndarray | None,
    dtype: np.dtype,
) -> tuple[np.ndarray, np.ndarray]:
    if active is None:
        active = np.any(stack != 0, axis=2)
    wide = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    with precision(dtype):
        j = jnp.asarray(stack, dtype)
        rounded = np.asarray(j.astype(wide), np.float64)
        products = in_batches(grams, np.asarray(j))
    weights = weigh(name, products, active, preference, wide)
    kept = np.where(weights[:, :, None] != 0, rounded, 0.0)
    return weights, np.einsum("mk,mkn->mn", weights, kept)


def apply_rule(
    method: Aggregator, stack: np.ndarray, active: np.ndarray | None = None, dtype: Any = np.float32
) -> np.ndarray:
    """Updates ``[M, N]`` of a coordinate-wise rule, in the gradients' type."""
    dtype = jnp.dtype(dtype)
    if active is None:
        active = np.any(stack != 0, axis=2)
    with precision(dtype):
        return in_batches(compiled_rule(method), np.asarray(jnp.asarray(stack, dtype)), active)


Resolve = Callable[[str, np.ndarray], tuple[np.ndarray, np.ndarray]]  # of a method and a stack


def assert_scaling_is_exact(resolve: Resolve, name: str, exponent: int, rounding: float) -> None:
    """Scaling by a power of two changes no bit, unless the weights depend on the scale."""
    weights, _ = resolve(name, STACK)
    scaled, _ = resolve(name, STACK * 2.0**exponent)
    degree = float(VARIANTS[name].gram_degree)
    np.testing.assert_allclose(
        scaled, weights * 2.0 ** (2 * exponent * degree), rtol=rounding * (degree != 0)
    )


def rotation_errors(resolve: Resolve, name: str) -> np.ndarray:
    """How far the updates of J Q, Q orthogonal, are from those of J times Q, ``[M]``."""
    q, _ = np.linalg.qr(np.random.default_rng(4).standard_normal((N, N)))
    weights, updates = resolve(name, STACK)
    _, rotated = resolve(name, STACK @ q)
    scale = size(weights, STACK) + mean_size(STACK)
    return np.linalg.norm(updates @ q - rotated, axis=1) / scale


def resolve_each(name: str | Aggregator, matrices: list[np.ndarray]) -> list[np.ndarray]:
    """Updates of single matrices of any size up to ``[9, 16]``."""
    stack = np.zeros((len(matrices), _MOST, N))
    for i, matrix in enumerate(matrices):
        stack[i, : matrix.shape[0], : matrix.shape[1]] = matrix
    _, updates = resolve(name, stack)
    return [updates[i, : matrix.shape[1]] for i, matrix in enumerate(matrices)]


def size(weights: np.ndarray, stack: np.ndarray) -> np.ndarray:
    """``sum_i |w_i| |g_i|`` per matrix: what rounding errors of an update are relative to."""
    norms = np.linalg.norm(np.nan_to_num(stack), axis=2)
    return np.sum(np.abs(weights) * norms, axis=1)


def mean_size(stack: np.ndarray) -> np.ndarray:
    """Mean norm of the gradients per matrix, never 0."""
    return np.linalg.norm(stack, axis=2).mean(1) + 1e-30
