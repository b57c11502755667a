"""The aggregators' updates in float64, by other algorithms than the package's.

The oracle of the accuracy benchmark: quadratic programs by SciPy's active-set non-negative least
squares on the gradients themselves (never on their Gram matrix, which squares the condition
number), closed forms by QR and SVD. Every quadratic program's optimality conditions are checked
before its solution is used. Published scales throughout; preferences are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.linalg import solve_triangular
from scipy.optimize import brentq, nnls

_TOLERANCE = 1e-9


def _cone(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """``argmin |columns z - target|`` over ``z >= 0``, with its optimality checked."""
    norms = np.linalg.norm(columns, axis=0)
    unit = columns / norms
    z, _ = nnls(unit, target, maxiter=100 * columns.shape[1])
    slack = unit.T @ (unit @ z - target)  # >= 0, and 0 where z > 0
    size = np.linalg.norm(target) + 1e-300
    if slack.min() < -_TOLERANCE * size or np.abs(slack[z > 0]).max(initial=0) > _TOLERANCE * size:
        raise ArithmeticError(f"reference solution is not optimal: {slack.min()}")
    return z / norms


def _shortest(points: np.ndarray) -> np.ndarray:
    """Weights of the shortest vector in the convex hull of the columns.

    ``min |P v|^2 + (sum v - 1)^2`` over ``v >= 0`` has its solution along these weights.
    """
    points = points / np.linalg.norm(points, axis=0).min()
    k = points.shape[1]
    v = _cone(np.vstack([points, np.ones(k)]), np.append(np.zeros(len(points)), 1.0))
    return v / v.sum()


def mgda(gradients: np.ndarray) -> np.ndarray:
    """Weights [K]; ``gradients`` [m, K] holds one gradient per column, like all below."""
    return _shortest(gradients)


def cagrad(gradients: np.ndarray, c: float = 0.5) -> np.ndarray:
    """Weights of ``g_0 + c |g_0| / |g_w| g_w``.

    With ``|g_w| = min_t (|g_w|^2 / t + t) / 2`` the dual is jointly convex in w and t; for fixed t
    it asks for the shortest vector in a shifted hull.
    """
    k = gradients.shape[1]
    centre = gradients.mean(1)
    radius = c * np.linalg.norm(centre)

    def direction(log_t: float) -> np.ndarray:
        return _shortest(gradients + (np.exp(log_t) / radius * centre)[:, None])

    def excess(log_t: float) -> float:
        return np.log(np.linalg.norm(gradients @ direction(log_t))) - log_t

    top = np.log(np.linalg.norm(gradients, axis=0).max()) + 1e-9
    w = direction(brentq(excess, top - 30, top, xtol=1e-15, rtol=1e-14, maxiter=500))
    return 1 / k + radius / np.linalg.norm(gradients @ w) * w


def dualproj(gradients: np.ndarray) -> np.ndarray:
    """Weights of the projection of the mean on the cone that opposes no objective."""
    mean = gradients.mean(1)
    return 1 / gradients.shape[1] + _cone(gradients, -mean)


def upgrad(gradients: np.ndarray) -> np.ndarray:
    """Mean of the weights of the projections of every gradient on that cone."""
    k = gradients.shape[1]
    return (1 + sum(_cone(gradients, -column) for column in gradients.T)) / k


def pcgrad(gradients: np.ndarray, orders: Sequence[Sequence[int]]) -> np.ndarray:
    """Weights of the sum of the projected gradients; ``orders[i]`` is the order of gradient i."""
    gram = gradients.T @ gradients
    weights = np.eye(gradients.shape[1])
    for row, order, i in zip(weights, orders, range(len(weights)), strict=True):
        for j in order:
            if j != i:
                row[j] -= min(0.0, row @ gram[j]) / gram[j, j]
    return weights.sum(0)


def _equal_cosines(gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of a direction with the same product with every *unit* gradient; the norms."""
    norms = np.linalg.norm(gradients, axis=0)
    r = np.linalg.qr(gradients / norms, mode="r")
    x = solve_triangular(r, solve_triangular(r, np.ones(len(norms)), trans="T"))
    return x / norms, norms


def imtl_g(gradients: np.ndarray) -> np.ndarray:
    """Weights summing to 1 whose update has equal projections on all gradients."""
    weights, _ = _equal_cosines(gradients)
    return weights / weights.sum()


def config(gradients: np.ndarray) -> np.ndarray:
    """Weights of the direction with equal cosines, as long as the gradients' projections on it."""
    weights, _ = _equal_cosines(gradients)
    direction = gradients @ weights
    return weights * (gradients.T @ direction).sum() / (direction @ direction)


def aligned_mtl(gradients: np.ndarray) -> np.ndarray:
    """Weights of the mean of the nearest gradients that are orthogonal and equally long."""
    _, s, vt = np.linalg.svd(gradients, full_matrices=False)
    return vt.T @ (s.min() / s * vt.mean(1))


def fairgrad(gradients: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    """Solution of ``G w = w^(-1/alpha)``, ``w > 0``, by Newton's method on its potential."""
    norms = np.linalg.norm(gradients, axis=0)
    gram = gradients.T @ gradients
    w = norms ** (-2 * alpha / (1 + alpha))
    for _ in range(500):
        slope = gram @ w - w ** (-1 / alpha)
        step = np.linalg.solve(
            (gram + np.diag(w ** (-1 / alpha - 1) / alpha)) * np.outer(w, w), -slope * w
        )
        w = w * (1 + step * min(1.0, 0.5 / max(-step.min(), 1e-300)))
        if np.abs(step).max() < 1e-13:
            return w
    raise ArithmeticError("reference solution did not converge")


def nash_mtl(gradients: np.ndarray) -> np.ndarray:
    """The same with alpha = 1, shortened to norm 1."""
    w = fairgrad(gradients)
    return w / max(1.0, np.linalg.norm(gradients @ w))


def update(weights: Callable[..., np.ndarray], jacobian: np.ndarray, **options) -> np.ndarray:
    """The exact update [n] of a matrix of gradients [K, n]."""
    j = np.asarray(jacobian, np.float64)
    return weights(np.linalg.qr(j.T, mode="r"), **options) @ j
