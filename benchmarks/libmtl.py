"""The formulas LibMTL uses, written anew from the papers and its documentation.

Each takes a matrix of gradients [K, n] and returns the update [n], with LibMTL's default settings
and scales; all of it is PyTorch on the matrix, as there. Not imported from LibMTL, which computes
the gradients itself and cannot be given a matrix.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import least_squares, minimize


def _on_segment(aa: float, ab: float, bb: float) -> float:
    """Weight of a in the shortest vector between a and b, kept off a and b as published."""
    if ab >= aa:
        return 0.999
    if ab >= bb:
        return 0.001
    return (bb - ab) / (aa + bb - 2 * ab)


def _project_on_simplex(y: torch.Tensor) -> torch.Tensor:
    descending = torch.sort(y, descending=True).values
    excess = (torch.cumsum(descending, 0) - 1) / torch.arange(1, len(y) + 1)
    return torch.clamp(y - excess[torch.nonzero(descending > excess)[-1]], min=0)


def mgda_weights(gram: torch.Tensor, iterations: int = 250, tolerance: float = 1e-5):
    """Sener and Koltun's solver: best pair, then projected gradient steps with a line search."""
    k = len(gram)
    best = (float("inf"), 0, 0, 0.5)
    for i in range(k):
        for j in range(i + 1, k):
            aa, ab, bb = float(gram[i, i]), float(gram[i, j]), float(gram[j, j])
            gamma = _on_segment(aa, ab, bb)
            length = gamma**2 * aa + 2 * gamma * (1 - gamma) * ab + (1 - gamma) ** 2 * bb
            best = min(best, (length, i, j, gamma))
    _, i, j, gamma = best
    w = torch.zeros(k)
    w[i], w[j] = gamma, 1 - gamma
    if k == 2:
        return w
    for _ in range(iterations):
        descent = -(gram @ w)
        descent = descent - descent.mean()
        # As far as the first weight to reach 0 or 1.
        reach = torch.cat([(-w / descent)[descent < 0], ((1 - w) / descent)[descent > 0]])
        reach = reach[reach > 1e-7]
        other = _project_on_simplex(w + descent * (reach.min() if len(reach) else 1.0))
        products = gram @ other
        gamma = _on_segment(float(w @ gram @ w), float(w @ products), float(other @ products))
        change = (1 - gamma) * (other - w)
        if change.abs().sum() < tolerance:
            break
        w = w + change
    return w


def mgda(jacobian: torch.Tensor) -> torch.Tensor:
    return mgda_weights(jacobian @ jacobian.T) @ jacobian


def cagrad(jacobian: torch.Tensor, c: float = 0.5) -> torch.Tensor:
    """SciPy's SLSQP on the dual, the update without rescaling (LibMTL divides by 1 + c^2)."""
    gram = (jacobian @ jacobian.T).numpy()
    k = len(gram)
    mean = np.full(k, 1 / k)
    radius = c * float(np.sqrt(gram.mean() + 1e-8)) + 1e-8
    solution = minimize(
        lambda w: w @ gram @ mean + radius * np.sqrt(w @ gram @ w + 1e-8),
        mean,
        bounds=[(0, 1)] * k,
        constraints={"type": "eq", "fun": lambda w: 1 - w.sum()},
    ).x
    towards = torch.tensor(solution, dtype=jacobian.dtype) @ jacobian
    return jacobian.mean(0) + radius / (towards.norm() + 1e-8) * towards


def pcgrad(jacobian: torch.Tensor) -> torch.Tensor:
    """Projections on the rows themselves, the own row included, summed."""
    projected = jacobian.clone()
    for row in projected:
        for j in torch.randperm(len(jacobian)).tolist():
            product = row @ jacobian[j]
            if product < 0:
                row -= product / jacobian[j].norm() ** 2 * jacobian[j]
    return projected.sum(0)


def imtl_g(jacobian: torch.Tensor) -> torch.Tensor:
    """The paper's closed form with differences to the first gradient."""
    unit = jacobian / jacobian.norm(dim=1, keepdim=True)
    d, u = jacobian[0] - jacobian[1:], unit[0] - unit[1:]
    rest = (jacobian[0] @ u.T) @ torch.linalg.inv(d @ u.T)
    return torch.cat([1 - rest.sum(0, keepdim=True), rest]) @ jacobian


def aligned_mtl_weights(gram: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values.max() * len(gram) * torch.finfo(gram.dtype).eps
    values, vectors = values[kept], vectors[:, kept]
    return ((vectors * (values.min() / values).sqrt()) @ vectors.T).sum(0)


def aligned_mtl(jacobian: torch.Tensor) -> torch.Tensor:
    """Summed over the objectives, as LibMTL does."""
    return aligned_mtl_weights(jacobian @ jacobian.T) @ jacobian


def fairgrad(jacobian: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """SciPy's bounded least squares on ``G w - w^(-1/alpha)``."""
    gram = (jacobian @ jacobian.T).numpy()
    start = np.full(len(gram), 1 / len(gram))
    w = least_squares(lambda w: gram @ w - w ** (-1 / alpha), start, bounds=(0, np.inf)).x
    return torch.tensor(w, dtype=jacobian.dtype) @ jacobian
