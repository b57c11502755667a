"""Independent float64 solutions, in NumPy and SciPy."""

from __future__ import annotations

import itertools

import numpy as np
from scipy.optimize import nnls


def min_norm(j: np.ndarray) -> np.ndarray:
    """Weights of the shortest vector in the hull of the rows.

    ``min |J^T y|^2 + (1^T y - 1)^2`` over ``y >= 0`` has its solution along it, whatever y's sum.
    Rows of very different norms are brought to a common scale first, in which the constraint
    becomes a weighted sum.
    """
    norms = np.linalg.norm(j, axis=1)
    row = norms.min() / norms
    z, _ = nnls(
        np.vstack([(j / norms[:, None]).T, row]),
        np.append(np.zeros(j.shape[1]), 1.0),
        maxiter=10000,
    )
    y = z / norms
    return y / y.sum()


def min_norm_by_enumeration(g: np.ndarray) -> np.ndarray:
    """The same from the Gram matrix by trying every support, for small K."""
    k = len(g)
    best, best_value = np.full(k, 1 / k), np.inf
    for count in range(1, k + 1):
        for support in itertools.combinations(range(k), count):
            rows = np.array(support)
            system = np.block([[g[np.ix_(rows, rows)], np.ones((count, 1))], [np.ones(count), 0.0]])
            w = np.linalg.lstsq(system, np.append(np.zeros(count), 1.0), rcond=None)[0][:-1]
            if w.min() < -1e-9 or abs(w.sum() - 1) > 1e-9:
                continue
            full = np.zeros(k)
            full[rows] = w
            value = full @ g @ full
            if value < best_value - 1e-14 * np.abs(g).max():
                best, best_value = full, value
    return best


def project_on_dual_cone(j: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The vector nearest to d that opposes no row of j."""
    norms = np.linalg.norm(j, axis=1)
    x, _ = nnls((j / norms[:, None]).T, -d, maxiter=10000)
    return d + (j / norms[:, None]).T @ x


def upgrad(j: np.ndarray) -> np.ndarray:
    return np.mean([project_on_dual_cone(j, row) for row in j], axis=0)


def dualproj(j: np.ndarray) -> np.ndarray:
    return project_on_dual_cone(j, j.mean(0))


def imtl_g(j: np.ndarray) -> np.ndarray:
    g = j @ j.T
    w = np.linalg.solve(g, np.sqrt(np.diag(g)))
    return (w / w.sum()) @ j


def aligned_mtl(j: np.ndarray, scale: str = "min") -> np.ndarray:
    # Through the singular values of J, which do not square the condition number.
    u, s, _ = np.linalg.svd(j, full_matrices=False)
    length = {"min": s.min(), "median": np.sort(s)[(len(s) - 1) // 2], "rmse": (s**2).mean() ** 0.5}
    w = length[scale] * (u / s) @ u.T @ np.full(len(j), 1 / len(j))
    return w @ j


def config(j: np.ndarray) -> np.ndarray:
    k = np.linalg.pinv(j / np.linalg.norm(j, axis=1, keepdims=True)) @ np.ones(len(j))
    k /= np.linalg.norm(k)
    return (j @ k).mean() * k


def pcgrad(j: np.ndarray, orders: list[tuple[int, ...]]) -> np.ndarray:
    """Mean of the projected gradients; ``orders[i]`` is the order in which i meets the others."""
    out = []
    for i, order in enumerate(orders):
        g = j[i].copy()
        for other in order:
            if other != i and g @ j[other] < 0:
                g -= (g @ j[other]) / (j[other] @ j[other]) * j[other]
        out.append(g)
    return np.mean(out, axis=0)


def gradvac(
    j: np.ndarray, orders: list[tuple[int, ...]], targets: np.ndarray, beta: float
) -> tuple[np.ndarray, np.ndarray]:
    """The paper's update rule, on the vectors themselves."""
    out, targets = [], targets.copy()
    for i, order in enumerate(orders):
        g = j[i].copy()
        for other in order:
            if other == i:
                continue
            norm, length = np.linalg.norm(g), np.linalg.norm(j[other])
            phi, t = g @ j[other] / (norm * length), targets[i, other]
            if phi < t:
                pull = t * np.sqrt(1 - phi**2) - phi * np.sqrt(1 - t**2)
                g += norm * pull / (length * np.sqrt(1 - t**2)) * j[other]
            targets[i, other] = (1 - beta) * t + beta * phi
        out.append(g)
    return np.mean(out, axis=0), targets
