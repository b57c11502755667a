"""Every method in every code base: jaxmoo, TorchJD 0.18, LibMTL's formulas, the exact solution."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import exact
import libmtl
import numpy as np
import torch
import torchjd.aggregation as torchjd

from jaxmoo import aggregators
from jaxmoo.aggregators import Aggregator


@dataclasses.dataclass(frozen=True)
class Method:
    """One method in every code base, all at the scale of TorchJD.

    Attributes:
      name: the method.
      ours: ours, with the options that give that scale.
      torchjd: TorchJD's aggregator for K objectives.
      exact: the float64 oracle; None where there is nothing to solve.
      libmtl: LibMTL's formula, matrix [K, n] to update [n].
      libmtl_sums: 1 where LibMTL sums over the objectives and the others average.
      weighting: TorchJD's function from a Gram matrix to weights, where it has one.
      non_conflicting: whether the method promises to oppose no objective.
    """

    name: str
    ours: Aggregator
    torchjd: Callable[[int], Any]
    exact: Callable[..., np.ndarray] | None = None
    libmtl: Callable[[torch.Tensor], torch.Tensor] | None = None
    libmtl_sums: int = 0
    weighting: Callable[[int], Any] | None = None
    non_conflicting: bool = False


METHODS = (
    Method("mean", aggregators.mean(), lambda k: torchjd.Mean(), None, lambda j: j.mean(0)),
    Method(
        "mgda",
        aggregators.mgda(),
        lambda k: torchjd.MGDA(),
        exact.mgda,
        libmtl.mgda,
        weighting=lambda k: torchjd.MGDAWeighting(),
        non_conflicting=True,
    ),
    Method(
        "cagrad",
        aggregators.cagrad(0.5, rescale="none"),
        lambda k: torchjd.CAGrad(0.5),
        exact.cagrad,
        libmtl.cagrad,
        weighting=lambda k: torchjd.CAGradWeighting(0.5),
    ),
    Method(
        "pcgrad",
        aggregators.pcgrad(reduction="sum"),
        lambda k: torchjd.PCGrad(),
        exact.pcgrad,
        libmtl.pcgrad,
        weighting=lambda k: torchjd.PCGradWeighting(),
    ),
    Method(
        "upgrad",
        aggregators.upgrad(),
        lambda k: torchjd.UPGrad(),
        exact.upgrad,
        weighting=lambda k: torchjd.UPGradWeighting(),
        non_conflicting=True,
    ),
    Method(
        "dualproj",
        aggregators.dualproj(),
        lambda k: torchjd.DualProj(),
        exact.dualproj,
        weighting=lambda k: torchjd.DualProjWeighting(),
        non_conflicting=True,
    ),
    Method(
        "imtl_g",
        aggregators.imtl_g(bound=1e6),
        lambda k: torchjd.IMTLG(),
        exact.imtl_g,
        libmtl.imtl_g,
        weighting=lambda k: torchjd.IMTLGWeighting(),
    ),
    Method(
        "aligned_mtl",
        aggregators.aligned_mtl(),
        lambda k: torchjd.AlignedMTL(),
        exact.aligned_mtl,
        libmtl.aligned_mtl,
        libmtl_sums=1,
        weighting=lambda k: torchjd.AlignedMTLWeighting(),
    ),
    Method(
        "config",
        aggregators.config(reduction="sum"),
        lambda k: torchjd.ConFIG(),
        exact.config,
        non_conflicting=True,
    ),
    Method(
        "nash_mtl",
        aggregators.nash_mtl(scale="published"),
        lambda k: torchjd.NashMTL(k),
        exact.nash_mtl,
        non_conflicting=True,
    ),
    Method(
        "fairgrad",
        aggregators.fairgrad(scale="published"),
        lambda k: torchjd.FairGrad(1.0),
        exact.fairgrad,
        libmtl.fairgrad,
        weighting=lambda k: torchjd.FairGradWeighting(1.0),
        non_conflicting=True,
    ),
)
