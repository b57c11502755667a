"""Outputs of another implementation in float64 on small matrices, where it is right.

Each departure is listed with its reason; the published scales are asked for by name.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from aggregators.families import resolve_each
from jaxmoo import aggregators as A

PATH = Path(__file__).parents[3] / "shared" / "golden" / "torchjd_0.18_float64.json"

if not PATH.exists():
    pytest.skip("the golden outputs are not here", allow_module_level=True)

GOLDENS = json.loads(PATH.read_text())

# name there: (variant here, factor to the published scale, relative tolerance, cases left out and
# why)
SMALL = "tiny(base*1e-3)"
EXACT = 2e-5
PAIRS = {
    "Mean": ("mean", 1, EXACT, {"zero_row": "an absent objective is left out"}),
    "Sum": ("sum", 1, EXACT, {}),
    # 20,000 Frank-Wolfe steps.
    "MGDA(1e-9,20000)": ("mgda", 1, 2e-4, {"zero_row": "returns 0"}),
    "IMTLG": ("imtl_g", 1, EXACT, {"rankdef": "pseudo-inverse of the cosines, another length"}),
    "AlignedMTL(min)": ("aligned_mtl", 1, EXACT, {"zero_row": "shrinks by 2/3"}),
    "AlignedMTL(median)": ("aligned_mtl median", 1, EXACT, {"zero_row": "shrinks by 2/3"}),
    "AlignedMTL(rmse)": ("aligned_mtl rmse", 1, EXACT, {"zero_row": "shrinks by 2/3"}),
    "ConFIG": ("config sum", 1, EXACT, {}),
    # Its default adds a ridge to G, so the comparison is with the exact variant.
    "UPGrad(eps=0)": ("upgrad", 1, EXACT, {"all_zero": "NaN"}),
    "DualProj(eps=0)": ("dualproj", 1, EXACT, {"all_zero": "NaN"}),
    # Clarabel's tolerance; published without the division by 1 + c.
    "CAGrad(.5)": (
        "cagrad",
        1.5,
        2e-4,
        {"zero_row": "returns 0", SMALL: "an absolute gate returns 0"},
    ),
    "CAGrad(.8)": (
        A.cagrad(0.8, rescale="none"),
        1,
        2e-4,
        {"zero_row": "returns 0", SMALL: "an absolute gate returns 0"},
    ),
    # A least-squares routine stops early.
    "FairGrad(1)": (
        A.fairgrad(1.0, scale="published"),
        1,
        1e-2,
        {"zero_row": "a weight of 572", "opposed": "no solution, weights of 512"},
    ),
    "FairGrad(2)": (
        "fairgrad published",
        1,
        2e-2,
        {"zero_row": "a weight of 8,723", "opposed": "no solution", SMALL: "stopped early"},
    ),
    "NashMTL": (
        "nash_mtl published",
        1,
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


@functools.cache
def updates(method: str | A.Aggregator) -> dict[str, np.ndarray]:
    """What ``method`` makes of every case, with float64 combination."""
    cases = [np.asarray(GOLDENS[case]["J"]) for case in CASES]
    return dict(zip(CASES, resolve_each(method, cases), strict=True))


def assert_equal(update: np.ndarray, case: str, theirs: str, tolerance: float) -> None:
    expected = np.asarray(GOLDENS[case]["agg"][theirs]["g"])
    largest, unit = np.abs(expected).max(), np.abs(GOLDENS[case]["J"]).max()
    # Where theirs is zero ours is rounding, relative to the gradients.
    atol = tolerance * largest if largest > 1e-9 * unit else 1e-6 * unit
    np.testing.assert_allclose(update, expected, rtol=0, atol=atol, err_msg=case)


@pytest.mark.parametrize("theirs", PAIRS)
def test_golden(theirs):
    method, factor, tolerance, left_out = PAIRS[theirs]
    for case, update in updates(method).items():
        if "error" not in GOLDENS[case]["agg"][theirs] and case not in left_out:
            assert_equal(factor * update, case, theirs, tolerance)


def test_golden_that_is_right_up_to_length():
    """Rank-deficient IMTL-G: the same direction."""
    update = updates("imtl_g")["rankdef"]
    golden = np.asarray(GOLDENS["rankdef"]["agg"]["IMTLG"]["g"])
    assert update @ golden / np.linalg.norm(update) / np.linalg.norm(golden) > 1 - 1e-6


@pytest.mark.parametrize("theirs", ["PCGrad(seed0)", "GradVac(seed0)"])
def test_golden_of_random_methods_for_two_objectives(theirs):
    """With two objectives there is one order."""
    method = theirs.removesuffix("(seed0)").lower()
    for case, update in updates(method).items():
        # An absolute 1e-8 in their norms shows in the small case.
        if len(GOLDENS[case]["J"]) == 2 and not (case == SMALL and method == "gradvac"):
            assert_equal(2 * update, case, theirs, EXACT)  # they sum
