"""Methods with a closed solution, against float64 oracles on the gradients themselves."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from aggregators import oracles
from aggregators.families import LABELS, STACK, Resolve, resolve, size

ORACLES = {
    "mgda": lambda j: oracles.min_norm(j) @ j,
    "upgrad": oracles.upgrad,
    "dualproj": oracles.dualproj,
    "imtl_g": oracles.imtl_g,
    "config": oracles.config,
    "aligned_mtl": oracles.aligned_mtl,
    "aligned_mtl median": partial(oracles.aligned_mtl, scale="median"),
    "aligned_mtl rmse": partial(oracles.aligned_mtl, scale="rmse"),
}
# Where the matrix has no inverse, these are tested by their promises alone.
NEED_RANK = ("imtl_g", "config", "aligned_mtl", "aligned_mtl median", "aligned_mtl rmse")
DEPENDENT = ("low-rank", "imbalanced low-rank", "duplicates", "opposed", "equal")


def formula_errors(resolve: Resolve, name: str) -> Iterator[tuple[str, int, float]]:
    """Family, seed and error of every matrix of which the formula holds."""
    weights, updates = resolve(name, STACK)
    scale = size(weights, STACK)
    for i, (family, seed) in enumerate(LABELS):
        j = STACK[i][np.any(STACK[i] != 0, axis=1)]
        if len(j) and not (name in NEED_RANK and family in DEPENDENT):
            yield family, seed, np.linalg.norm(updates[i] - ORACLES[name](j)) / scale[i]


@pytest.mark.parametrize("name", ORACLES)
def test_method_equals_its_formula(name):
    for family, seed, error in formula_errors(resolve, name):
        assert error <= 1e-5, (family, seed)


def test_mgda_improves_every_objective_by_the_squared_length():
    weights, updates = resolve("mgda", STACK)
    square = np.sum(updates**2, axis=1)
    products = np.einsum("mkn,mn->mk", STACK, updates)
    present = np.any(STACK != 0, axis=2)
    norm = np.linalg.norm(STACK, axis=2)
    slack = (products - square[:, None]) / (norm * size(weights, STACK)[:, None] + 1e-30)
    assert slack[present].min() >= -1e-6


def test_normalised_mgda_ignores_the_norms():
    """Its direction is that for unit gradients."""
    _, updates = resolve("mgda l2", STACK)
    norms = np.linalg.norm(STACK, axis=2, keepdims=True)
    _, unit = resolve("mgda", STACK / np.where(norms > 0, norms, 1))
    for i, (family, _) in enumerate(LABELS):
        if family in ("random", "imbalanced", "correlated"):
            cosine = updates[i] @ unit[i] / np.linalg.norm(updates[i]) / np.linalg.norm(unit[i])
            assert cosine > 1 - 1e-6


def test_preferences_weight_the_projected_gradients_of_upgrad():
    preference = np.arange(1.0, STACK.shape[1] + 1)
    _, updates = resolve("upgrad", STACK, preference=preference)
    j = STACK[0]
    projected = [oracles.project_on_dual_cone(j, row) for row in j]
    expected = preference / preference.sum() @ projected
    np.testing.assert_allclose(updates[0], expected, atol=1e-5)


def test_preferences_are_projections_and_cosines():
    """imtl_g: projections proportional to p; config: cosines proportional to p."""
    preference = np.arange(1.0, STACK.shape[1] + 1)
    unit = STACK[0] / np.linalg.norm(STACK[0], axis=1, keepdims=True)
    for name in ("imtl_g", "config"):
        _, updates = resolve(name, STACK, preference=preference)
        projections = unit @ updates[0]
        np.testing.assert_allclose(projections / projections[0], preference, rtol=1e-4)


def test_imtl_g_is_bounded_and_never_turns_into_ascent():
    """The published divisor, the sum of the weights, may be tiny or negative."""
    rng = np.random.default_rng(1)
    stack = rng.standard_normal(STACK.shape) * np.exp(
        2 * rng.standard_normal((*STACK.shape[:2], 1))
    )
    exact = [np.linalg.solve(j @ j.T, np.linalg.norm(j, axis=1)) for j in stack]
    assert any(w.sum() < 0 for w in exact)  # the fault would show here
    weights, updates = resolve("imtl_g", stack)
    assert np.abs(weights).sum(1).max() <= 10 * (1 + 1e-5)
    projections = np.einsum("mkn,mn->mk", stack, updates)
    assert projections.min() > 0


def test_aligned_mtl_hears_a_weak_objective():
    """Rows a thousand times smaller are part of the rank, not rounding."""
    j = STACK[[family == "imbalanced" for family, _ in LABELS]][0]
    full = np.resize(j, STACK.shape)
    _, updates = resolve("aligned_mtl", full)
    weakest = j[np.argmin(np.linalg.norm(j, axis=1))]
    assert weakest @ updates[0] > 0.1 * np.linalg.norm(weakest) * np.linalg.norm(updates[0])
