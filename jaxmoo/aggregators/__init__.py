"""Gradient-based multi-objective aggregators: K gradients in, one update out.

Every method is a factory that returns an :class:`Aggregator`; ``get`` finds one by name. By
default K equal gradients g give g, so a learning rate carries over from ordinary training.
"""

from jaxmoo.aggregators.aggregate import aggregate, combine_rows, cross_gram, gram
from jaxmoo.aggregators.aligned_mtl import aligned_mtl
from jaxmoo.aggregators.base import (
    Aggregator,
    combine_block,
    init_blocks,
    weigh_block,
    weigh_blocks,
)
from jaxmoo.aggregators.cagrad import cagrad
from jaxmoo.aggregators.conflict_free import config
from jaxmoo.aggregators.constant import constant
from jaxmoo.aggregators.cr_mogm import cr_mogm
from jaxmoo.aggregators.dualproj import dualproj
from jaxmoo.aggregators.excess_mtl import excess_mtl
from jaxmoo.aggregators.fairgrad import fairgrad
from jaxmoo.aggregators.graddrop import graddrop
from jaxmoo.aggregators.gradvac import gradvac
from jaxmoo.aggregators.imtl_g import imtl_g
from jaxmoo.aggregators.krum import krum
from jaxmoo.aggregators.mean import mean, sum
from jaxmoo.aggregators.mgda import mgda
from jaxmoo.aggregators.moco import moco, track_gradients
from jaxmoo.aggregators.modo import modo
from jaxmoo.aggregators.nash_mtl import nash_mtl
from jaxmoo.aggregators.pcgrad import pcgrad
from jaxmoo.aggregators.random_weights import random
from jaxmoo.aggregators.registry import get, names
from jaxmoo.aggregators.sdmgrad import sdmgrad
from jaxmoo.aggregators.trimmed_mean import trimmed_mean
from jaxmoo.aggregators.unit_mean import unit_mean
from jaxmoo.aggregators.upgrad import upgrad

__all__ = [
    "Aggregator",
    "aggregate",
    "aligned_mtl",
    "cagrad",
    "combine_block",
    "combine_rows",
    "config",
    "constant",
    "cr_mogm",
    "cross_gram",
    "dualproj",
    "excess_mtl",
    "fairgrad",
    "get",
    "graddrop",
    "gradvac",
    "gram",
    "imtl_g",
    "init_blocks",
    "krum",
    "mean",
    "mgda",
    "moco",
    "modo",
    "names",
    "nash_mtl",
    "pcgrad",
    "random",
    "sdmgrad",
    "sum",
    "track_gradients",
    "trimmed_mean",
    "unit_mean",
    "upgrad",
    "weigh_block",
    "weigh_blocks",
]
