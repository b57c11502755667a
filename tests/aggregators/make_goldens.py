"""Write ``torchjd.json``: what TorchJD's aggregators make of small matrices, in float64.

Made with TorchJD 0.18.0 and PyTorch 2.13.0:

    python3 -m venv goldens && goldens/bin/pip install "torchjd[full]==0.18.*"
    goldens/bin/python tests/aggregators/make_goldens.py

The file holds per case the matrix and the aggregations by name, null where one is not a number or
ends with an error: ``{case: {"matrix": [...], "aggregations": {name: [...]}}}``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from qpsolvers.exceptions import QPError
from torchjd import aggregation as theirs
from torchjd.linalg import QuadprogProjector

PATH = Path(__file__).with_name("torchjd.json")
CONFLICT = [[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]

# Methods that both have, of given numbers of rows; a new one for each matrix.
AGGREGATORS: dict[str, Callable[[int], theirs.Aggregator]] = {
    "Mean": lambda k: theirs.Mean(),
    "Sum": lambda k: theirs.Sum(),
    "MGDA": lambda k: theirs.MGDA(epsilon=1e-9, max_iters=20_000),
    "IMTLG": lambda k: theirs.IMTLG(),
    "AlignedMTL(min)": lambda k: theirs.AlignedMTL(scale_mode="min"),
    "AlignedMTL(median)": lambda k: theirs.AlignedMTL(scale_mode="median"),
    "AlignedMTL(rmse)": lambda k: theirs.AlignedMTL(scale_mode="rmse"),
    "ConFIG": lambda k: theirs.ConFIG(),
    # By default they add a ridge to G, and take a small G for none.
    "UPGrad": lambda k: theirs.UPGrad(projector=QuadprogProjector(norm_eps=0.0, reg_eps=0.0)),
    "DualProj": lambda k: theirs.DualProj(projector=QuadprogProjector(norm_eps=0.0, reg_eps=0.0)),
    "CAGrad(0.5)": lambda k: theirs.CAGrad(0.5),
    "CAGrad(0.8)": lambda k: theirs.CAGrad(0.8),
    "FairGrad(1)": lambda k: theirs.FairGrad(1.0),
    "FairGrad(2)": lambda k: theirs.FairGrad(2.0),
    "NashMTL": lambda k: theirs.NashMTL(n_tasks=k),
    "PCGrad": lambda k: theirs.PCGrad(),
    "GradVac": lambda k: theirs.GradVac(),
    "TrimmedMean(1)": lambda k: theirs.TrimmedMean(1),
    "Krum(1)": lambda k: theirs.Krum(1),
}


def matrices() -> dict[str, np.ndarray]:
    """Matrices worked out by hand, degenerate ones, and some of known structure, by name."""
    normal = np.random.default_rng(0).standard_normal
    cases = {
        "conflict": CONFLICT,
        "three": [[1, 2, -1, 0], [-2, 1, 0.5, 1], [0.5, -1.5, 2, -1]],
        "single": [[3, 4]],
        "zero row": [*CONFLICT, [0, 0, 0]],
        "all zero": np.zeros((2, 3)),
        "opposed": [[1, 2, 3], [-1, -2, -3]],
        "rank one short": [[1, 0, 2], [2, 0, 4], [-1, 1, 0]],
        "tiny": np.multiply(CONFLICT, 1e-3),
        "imbalanced": np.multiply(CONFLICT, [[1], [100]]),
        "random": normal((6, 6)),
        "correlated": normal(6) + 0.5 * normal((4, 6)),
        "imbalanced random": normal((3, 5)) * [[1], [10], [50]],
        "low rank": normal((4, 2)) @ normal((2, 6)),
    }
    return {name: np.asarray(case, np.float64) for name, case in cases.items()}


def aggregated(make: Callable[[int], theirs.Aggregator], matrix: np.ndarray) -> list | None:
    """One aggregation of a matrix, or None without one."""
    torch.manual_seed(0)
    try:
        found = make(len(matrix))(torch.tensor(matrix)).tolist()
    except (QPError, RuntimeError, ValueError):
        return None
    return found if np.isfinite(found).all() else None


def main() -> None:
    """Write the file."""
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    goldens = {
        case: {
            "matrix": matrix.tolist(),
            "aggregations": {name: aggregated(make, matrix) for name, make in AGGREGATORS.items()},
        }
        for case, matrix in matrices().items()
    }
    PATH.write_text(json.dumps(goldens, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
