"""Outputs of another implementation in float64 on small matrices, where it is right.

Each departure is listed with its reason; the published scales are asked for by name.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aggregators.families import quick_jit
from jaxmoo import aggregators as A

PATH = Path(__file__).parents[3] / "shared" / "golden" / "torchjd_0.18_float64.json"

if not PATH.exists():
    pytest.skip("the golden outputs are not here", allow_module_level=True)

GOLDENS = json.loads(PATH.read_text())

# name there: (aggregator here, relative tolerance, cases left out and why)
SMALL = "tiny(base*1e-3)"
EXACT = 2e-5
PAIRS = {
    "Mean": (A.mean(), EXACT, {"zero_row": "an absent objective is left out"}),
    "Sum": (A.sum(), EXACT, {}),
    # 20,000 Frank-Wolfe steps.
    "MGDA(1e-9,20000)": (A.mgda(), 2e-4, {"zero_row": "returns 0"}),
    "IMTLG": (
        A.imtl_g(),
        EXACT,
        {"rankdef": "pseudo-inverse of the cosines, another length"},
    ),
    "AlignedMTL(min)": (A.aligned_mtl(), EXACT, {"zero_row": "shrinks by 2/3"}),
    "AlignedMTL(median)": (A.aligned_mtl(scale="median"), EXACT, {"zero_row": "shrinks by 2/3"}),
    "AlignedMTL(rmse)": (A.aligned_mtl(scale="rmse"), EXACT, {"zero_row": "shrinks by 2/3"}),
    "ConFIG": (A.config(reduction="sum"), EXACT, {}),
    # Its default adds a ridge to G, so the comparison is with the exact variant.
    "UPGrad(eps=0)": (A.upgrad(), EXACT, {"all_zero": "NaN"}),
    "DualProj(eps=0)": (A.dualproj(), EXACT, {"all_zero": "NaN"}),
    # Clarabel's tolerance.
    "CAGrad(.5)": (
        A.cagrad(0.5, rescale="none"),
        2e-4,
        {"zero_row": "returns 0", SMALL: "an absolute gate returns 0"},
    ),
    "CAGrad(.8)": (
        A.cagrad(0.8, rescale="none"),
        2e-4,
        {"zero_row": "returns 0", SMALL: "an absolute gate returns 0"},
    ),
    # A least-squares routine stops early.
    "FairGrad(1)": (
        A.fairgrad(1.0, scale="published"),
        1e-2,
        {"zero_row": "a weight of 572", "opposed": "no solution, weights of 512"},
    ),
    "FairGrad(2)": (
        A.fairgrad(2.0, scale="published"),
        2e-2,
        {"zero_row": "a weight of 8,723", "opposed": "no solution", SMALL: "stopped early"},
    ),
    "NashMTL": (
        A.nash_mtl(scale="published"),
        1e-2,
        {
            "zero_row": "returns equal weights",
            "opposed": "no solution",
            SMALL: "stopped early",
            "imbalanced": "stopped early",
        },
    ),
}


CASES = tuple(GOLDENS)


def padded() -> np.ndarray:
    """All cases as one batch ``[M, 3, 4]``; missing rows and columns are zero."""
    stack = np.zeros((len(CASES), 3, 4))
    for i, case in enumerate(CASES):
        j = np.asarray(GOLDENS[case]["J"])
        stack[i, : j.shape[0], : j.shape[1]] = j
    return stack


@functools.cache
def updates(method: A.Aggregator) -> dict[str, np.ndarray]:
    """What ``method`` makes of every case, with float64 combination."""
    stack = padded()
    grams = np.einsum("mkn,mln->mkl", stack, stack).astype(np.float32)
    active, key = jnp.asarray(np.any(stack != 0, axis=2)), jax.random.key(0)
    weights, _ = quick_jit(lambda g: A.weigh_blocks(method, g, active=active, key=key))(grams)
    d = np.einsum("mk,mkn->mn", np.asarray(weights, np.float64), stack)
    return {case: d[i, : len(GOLDENS[case]["J"][0])] for i, case in enumerate(CASES)}


def assert_equal(update: np.ndarray, case: str, theirs: str, tolerance: float) -> None:
    expected = np.asarray(GOLDENS[case]["agg"][theirs]["g"])
    largest, unit = np.abs(expected).max(), np.abs(GOLDENS[case]["J"]).max()
    # Where theirs is zero ours is rounding, relative to the gradients.
    atol = tolerance * largest if largest > 1e-9 * unit else 1e-6 * unit
    np.testing.assert_allclose(update, expected, rtol=0, atol=atol, err_msg=case)


@pytest.mark.parametrize("theirs", PAIRS)
def test_golden(theirs):
    method, tolerance, left_out = PAIRS[theirs]
    for case, update in updates(method).items():
        if "error" not in GOLDENS[case]["agg"][theirs] and case not in left_out:
            assert_equal(update, case, theirs, tolerance)


def test_golden_that_is_right_up_to_length():
    """Rank-deficient IMTL-G: the same direction."""
    update = updates(A.imtl_g())["rankdef"]
    golden = np.asarray(GOLDENS["rankdef"]["agg"]["IMTLG"]["g"])
    assert update @ golden / np.linalg.norm(update) / np.linalg.norm(golden) > 1 - 1e-6


@pytest.mark.parametrize("theirs", ["PCGrad(seed0)", "GradVac(seed0)"])
def test_golden_of_random_methods_for_two_objectives(theirs):
    """With two objectives there is one order."""
    method = {"PCGrad(seed0)": A.pcgrad, "GradVac(seed0)": A.gradvac}[theirs](reduction="sum")
    for case, update in updates(method).items():
        # An absolute 1e-8 in their norms shows in the small case.
        if len(GOLDENS[case]["J"]) == 2 and not (case == SMALL and method.name == "gradvac"):
            assert_equal(update, case, theirs, EXACT)
