"""Outputs of TorchJD in float64 on small matrices, where it is right.

Each departure is listed with its reason; the published scales are asked for by name.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from aggregators.families import resolve_each
from jaxmoo import aggregators as A

# Written by `make_goldens.py`.
GOLDENS = json.loads(Path(__file__).with_name("torchjd.json").read_text("utf-8"))

# name there: (variant here, factor to the published scale, relative tolerance, cases left out and
# why); also left out are those of which it makes no numbers
EXACT = 2e-5
PAIRS = {
    "Mean": ("mean", 1, EXACT, {"zero row": "an absent objective is left out"}),
    "Sum": ("sum", 1, EXACT, {}),
    # 20,000 Frank-Wolfe steps.
    "MGDA": (
        "mgda",
        1,
        2e-4,
        {
            "zero row": "returns 0",
            "random": "needs more",
            "imbalanced random": "needs more",
            "low rank": "0, rounded",
        },
    ),
    "IMTLG": (
        "imtl_g",
        1,
        EXACT,
        {
            "rank one short": "pseudo-inverse of the cosines, another length",
            "low rank": "no update has equal cosines",
        },
    ),
    "AlignedMTL(min)": ("aligned_mtl", 1, EXACT, {"zero row": "shrinks by 2/3"}),
    "AlignedMTL(median)": ("aligned_mtl median", 1, EXACT, {"zero row": "shrinks by 2/3"}),
    "AlignedMTL(rmse)": ("aligned_mtl rmse", 1, EXACT, {"zero row": "shrinks by 2/3"}),
    "ConFIG": ("config sum", 1, EXACT, {}),
    "UPGrad": ("upgrad", 1, EXACT, {}),
    "DualProj": ("dualproj", 1, EXACT, {}),
    # Clarabel's tolerance; published without the division by 1 + c.
    "CAGrad(0.5)": (
        "cagrad",
        1.5,
        2e-4,
        {"zero row": "returns 0", "tiny": "an absolute gate returns 0"},
    ),
    "CAGrad(0.8)": (
        A.cagrad(0.8, rescale="none"),
        1,
        2e-4,
        {"zero row": "returns 0", "tiny": "an absolute gate returns 0"},
    ),
    # A least-squares routine stops early.
    "FairGrad(1)": (
        A.fairgrad(1.0, scale="published"),
        1,
        1e-2,
        {
            "zero row": "a weight of 572",
            "opposed": "no solution, weights of 512",
            "low rank": "no solution",
        },
    ),
    "FairGrad(2)": (
        "fairgrad published",
        1,
        2e-2,
        {
            "zero row": "a weight of 8,723",
            "opposed": "no solution",
            "low rank": "no solution",
            "tiny": "stopped early",
        },
    ),
    "NashMTL": (
        "nash_mtl published",
        1,
        1e-2,
        {
            "zero row": "returns equal weights",
            "opposed": "no solution",
            "tiny": "stopped early",
            "imbalanced": "stopped early",
            "low rank": "no solution",
            "random": "stopped early",
            "imbalanced random": "stopped early",
        },
    ),
    # With four objectives one neighbour counts, and two nearest ones tie.
    "Krum(1)": ("krum", 1, EXACT, {"correlated": "tie", "low rank": "tie"}),
}


CASES = tuple(GOLDENS)


@functools.cache
def updates(method: str | A.Aggregator) -> dict[str, np.ndarray]:
    """What ``method`` makes of every case, with float64 combination."""
    cases = [np.asarray(GOLDENS[case]["matrix"]) for case in CASES]
    return dict(zip(CASES, resolve_each(method, cases), strict=True))


def assert_equal(update: np.ndarray, case: str, theirs: str, tolerance: float) -> None:
    expected = np.asarray(GOLDENS[case]["aggregations"][theirs])
    largest, unit = np.abs(expected).max(), np.abs(GOLDENS[case]["matrix"]).max()
    # Where theirs is zero ours is rounding, relative to the gradients.
    atol = tolerance * largest if largest > 1e-9 * unit else 1e-6 * unit
    np.testing.assert_allclose(update, expected, rtol=0, atol=atol, err_msg=case)


@pytest.mark.parametrize("theirs", PAIRS)
def test_golden(theirs):
    method, factor, tolerance, left_out = PAIRS[theirs]
    for case, update in updates(method).items():
        if GOLDENS[case]["aggregations"][theirs] and case not in left_out:
            assert_equal(factor * update, case, theirs, tolerance)


def test_golden_that_is_right_up_to_length():
    """Rank-deficient IMTL-G: the same direction."""
    update = updates("imtl_g")["rank one short"]
    golden = np.asarray(GOLDENS["rank one short"]["aggregations"]["IMTLG"])
    assert update @ golden / np.linalg.norm(update) / np.linalg.norm(golden) > 1 - 1e-6


@pytest.mark.parametrize("theirs", ["PCGrad", "GradVac"])
def test_golden_of_random_methods_for_two_objectives(theirs):
    """With two objectives there is one order."""
    method = theirs.lower()
    for case, update in updates(method).items():
        # An absolute 1e-8 in their norms shows in the small case.
        if len(GOLDENS[case]["matrix"]) == 2 and not (case == "tiny" and method == "gradvac"):
            assert_equal(2 * update, case, theirs, EXACT)  # they sum


def test_golden_of_a_method_of_coordinates():
    compared = 0
    for case, golden in GOLDENS.items():
        theirs = golden["aggregations"]["TrimmedMean(1)"]
        if theirs and case != "zero row":  # an absent objective is left out
            update = A.aggregate("trimmed_mean", jnp.asarray(golden["matrix"], jnp.float32))
            assert_equal(np.asarray(update), case, "TrimmedMean(1)", EXACT)
            compared += 1
    assert compared >= 5
