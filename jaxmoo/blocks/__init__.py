"""How a parameter tree is cut into blocks.

A *block* is a set of parameters whose per-objective gradients are resolved together: one Gram
matrix, one solve, one weight per objective. Coarser blocks see more of each objective, finer ones
resolve conflicts where they happen.

The unit a block is made of is a *piece*: one array of the tree or, for an array that stacks the
layers of a scanned model, one layer's slice of it. Every kind of block is a rule that gives each
piece a label; pieces with equal labels form a block.

========================  =====================================================================
``whole``                 one block: every parameter (the classical methods)
``layer``                 one per layer; what lies outside the layers by its top-level name
``module``                one per sub-module of a layer (attention, MLP, each norm)
``expert``                one per expert of each layer's mixture; the rest as ``layer``
``leaf``                  one per array of each layer
``bytes:25MiB``           consecutive pieces in backward order up to a size, as DDP and ZeRO fill
                          their buckets; larger arrays are cut
``slices:16``             every array in 16 slices along its leading axis: for the vocabulary
``shard:8``               what each of 8 devices holds of every layer: resolving needs no
                          communication, but the result depends on the number of devices
``random:32``             a random partition into 32 blocks of pieces: the control experiment
========================  =====================================================================

Rules compose: :func:`choose` takes a rule per part of the model, :func:`intersect` cuts by two
rules at once.
"""

from jaxmoo.blocks.description import describe
from jaxmoo.blocks.partition import Partition, partition
from jaxmoo.blocks.piece import Blocks, Piece, path_string
from jaxmoo.blocks.rules import (
    by,
    choose,
    expert,
    get,
    intersect,
    layer,
    leaf,
    module,
    names,
    of_bytes,
    random,
    shard,
    slices,
    whole,
)

__all__ = [
    "Blocks",
    "Partition",
    "Piece",
    "by",
    "choose",
    "describe",
    "expert",
    "get",
    "intersect",
    "layer",
    "leaf",
    "module",
    "names",
    "of_bytes",
    "partition",
    "path_string",
    "random",
    "shard",
    "slices",
    "whole",
]
