"""Resolving, after the backward pass, the blocks that no single call sees all gradients of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoo.engine.backward import Backward
from jaxmoo.engine.block_table import BlockTable
from jaxmoo.engine.call_blocks import CallBlocks
from jaxmoo.engine.layout import sections_of_piece
from jaxmoo.engine.usage import Use

__all__ = ["resolve_deferred"]


def resolve_deferred(
    engine: Backward,
    updates: Sequence[jax.Array],
    accumulators: Mapping[int, jax.Array],
    table: BlockTable,
) -> tuple[list[jax.Array], BlockTable]:
    """Resolve the blocks of deferred arrays.

    Args:
      engine: with the states before the pass.
      updates: what the pass gave, per array: resolved gradients, zero for deferred arrays.
      accumulators: by number of the deferred array, the objectives' gradients [layers, K, *piece]
        or [K, *piece].
      table: what the pass gave.

    Returns:
      The updates of all arrays, and the table with these blocks' rows.
    """
    top = engine.topology
    layouts = {leaf: engine.layouts[leaf] for leaf in sorted(accumulators)}
    # As if every stack were one array with all its layers' sections.
    flat = {
        leaf: dataclasses.replace(layout, labels=layout.block_labels.reshape(1, -1), layers=None)
        for leaf, layout in layouts.items()
    }
    call = CallBlocks.of(flat, engine.rules, [Use(leaf, None) for leaf in layouts], top)
    indices = call.indices
    sections = []
    for (leaf, layout), label in zip(layouts.items(), indices.labels, strict=True):
        gradients = accumulators[leaf]
        stacked = layout.layers is not None
        gradients = jnp.moveaxis(gradients, 0, 1) if stacked else gradients[:, None]
        count = gradients.shape[1]
        label = label.reshape(count, -1)
        sections.append(sections_of_piece(gradients, layout, leaf, label, np.arange(count), top))
    states = call.rows(engine.table).states
    resolved = engine.resolve(sections, call, indices, states, engine.step)
    updates = list(updates)
    for (leaf, layout), update in zip(layouts.items(), resolved.updates, strict=True):
        updates[leaf] = update.reshape(layout.stack_shape(top.pieces)).astype(layout.dtype)
    rows = call.new_rows(resolved, indices.members)
    diagnostics = table.diagnostics.at[indices.numbers].add(rows.diagnostics)
    new_states = list(table.states)
    for group, new in zip(call.groups, rows.states, strict=True):
        new_states[group.number] = jax.tree.map(
            lambda t, x, c=group.candidates: t.at[indices.numbers[c]].add(x),
            new_states[group.number],
            new,
        )
    return updates, BlockTable(diagnostics, tuple(new_states))
