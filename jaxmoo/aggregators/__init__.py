"""Gradient-based multi-objective aggregators: K gradients in, one update out.

Every method is a factory that returns an :class:`Aggregator`; ``get`` finds one by name. By
default K equal gradients g give g, so a learning rate carries over from ordinary training.

A method is one file in ``methods``, whose factory is decorated with ``@register``, and one line
below. The order of the lines is that of :func:`names`.
"""

from jaxmoo.aggregators.aggregate import aggregate as aggregate
from jaxmoo.aggregators.aggregate import combine_rows as combine_rows
from jaxmoo.aggregators.aggregate import cross_gram as cross_gram
from jaxmoo.aggregators.aggregate import gram as gram
from jaxmoo.aggregators.aggregator import Aggregator as Aggregator
from jaxmoo.aggregators.aggregator import get as get
from jaxmoo.aggregators.aggregator import names as names
from jaxmoo.aggregators.aggregator import register as register
from jaxmoo.aggregators.weighing import combine_block as combine_block
from jaxmoo.aggregators.weighing import init_blocks as init_blocks
from jaxmoo.aggregators.weighing import weigh_block as weigh_block
from jaxmoo.aggregators.weighing import weigh_blocks as weigh_blocks

# isort: off
from jaxmoo.aggregators.methods.mean import mean as mean
from jaxmoo.aggregators.methods.mean import sum as sum
from jaxmoo.aggregators.methods.constant import constant as constant
from jaxmoo.aggregators.methods.random_weights import random as random
from jaxmoo.aggregators.methods.unit_mean import unit_mean as unit_mean
from jaxmoo.aggregators.methods.mgda import mgda as mgda
from jaxmoo.aggregators.methods.cagrad import cagrad as cagrad
from jaxmoo.aggregators.methods.pcgrad import pcgrad as pcgrad
from jaxmoo.aggregators.methods.gradvac import gradvac as gradvac
from jaxmoo.aggregators.methods.upgrad import upgrad as upgrad
from jaxmoo.aggregators.methods.dualproj import dualproj as dualproj
from jaxmoo.aggregators.methods.imtl_g import imtl_g as imtl_g
from jaxmoo.aggregators.methods.aligned_mtl import aligned_mtl as aligned_mtl
from jaxmoo.aggregators.methods.conflict_free import config as config
from jaxmoo.aggregators.methods.nash_mtl import nash_mtl as nash_mtl
from jaxmoo.aggregators.methods.fairgrad import fairgrad as fairgrad
from jaxmoo.aggregators.methods.sdmgrad import sdmgrad as sdmgrad
from jaxmoo.aggregators.methods.modo import modo as modo
from jaxmoo.aggregators.methods.moco import moco as moco
from jaxmoo.aggregators.methods.moco import track_gradients as track_gradients
from jaxmoo.aggregators.methods.cr_mogm import cr_mogm as cr_mogm
from jaxmoo.aggregators.methods.excess_mtl import excess_mtl as excess_mtl
from jaxmoo.aggregators.methods.graddrop import graddrop as graddrop
from jaxmoo.aggregators.methods.trimmed_mean import trimmed_mean as trimmed_mean
from jaxmoo.aggregators.methods.krum import krum as krum
