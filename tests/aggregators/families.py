"""Matrices of gradients with a named structure, and the compiled path all property tests share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoo import aggregators
from jaxmoo.aggregators import Aggregator

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


# The suite compiles some fifty small programs and runs each for milliseconds.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def compiled(name: str | Aggregator):
    """``(grams [M, K, K], active [M, K], preference [K], key) -> weights``, compiled once."""
    method = VARIANTS[name] if isinstance(name, str) else name

    @quick_jit
    def weigh(grams, active, preference, key):
        return aggregators.weigh_blocks(
            method, grams, active=active, preference=preference, key=key
        )[0]

    return weigh


grams = jax.jit(jax.vmap(aggregators.gram))
combine = jax.jit(jax.vmap(aggregators.combine_rows))


def resolve(
    name: str | Aggregator,
    stack: np.ndarray,
    *,
    active: np.ndarray | None = None,
    preference: np.ndarray | None = None,
    dtype=jnp.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``[M, K]`` (float64) and updates ``[M, N]`` of many matrices.

    Without ``active``, a zero row is absent, as for a matrix on its own. Updates are formed in
    float64 from the weights, so that only the weights' errors show.
    """
    stack = np.asarray(stack, np.float64)
    j = jnp.asarray(stack, dtype)
    if active is None:
        active = np.any(stack != 0, axis=2)
    share = jnp.asarray(np.ones(stack.shape[1]) if preference is None else preference, jnp.float32)
    weights = compiled(name)(grams(j), jnp.asarray(active), share, KEY)
    weights = np.asarray(weights, np.float64)
    rounded = np.asarray(j.astype(jnp.float32), np.float64)
    kept = np.where(weights[:, :, None] != 0, rounded, 0.0)
    return weights, np.einsum("mk,mkn->mn", weights, kept)


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
    """Updates of single matrices of any size up to ``[K, N]``.

    Padded with absent objectives and empty columns to the one shape that is compiled.
    """
    stack = np.zeros_like(STACK)
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
