"""Which blocks a call resolves, and which rows of the block table are theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoo.aggregators import Aggregator
from jaxmoo.block_solve import Resolution
from jaxmoo.engine.block_rules import BlockRules
from jaxmoo.engine.block_table import BlockTable, Diagnostics, no_diagnostics
from jaxmoo.engine.layout import Layout, Topology
from jaxmoo.engine.usage import Use

__all__ = ["BlockIndices", "CallBlocks", "CallGroup"]


class BlockIndices(NamedTuple):
    """Where a call's blocks are: integers that depend on the layer it is called for."""

    layers: tuple[jax.Array, ...]  # per array, the number of its layer, int32
    labels: tuple[jax.Array, ...]  # per array, its sections' blocks among the call's, int32 [parts]
    numbers: jax.Array  # int32 [m]: the call's blocks among all
    members: tuple[jax.Array | None, ...]  # per group, which candidates are its; None: all are
    sparse: jax.Array | None  # bool [m], from which objectives may be absent; None: from none


class CallGroup(NamedTuple):
    """Those of a call's blocks that may belong to one group of blocks."""

    number: int  # of the group, among all groups
    aggregator: Aggregator
    candidates: np.ndarray  # int: which of the call's blocks


class CallBlocks(NamedTuple):
    """The blocks one call resolves, which may depend on the layer it is called for.

    Attributes:
      indices: see :class:`BlockIndices`.
      groups: groups of blocks that the call's may belong to.
      num_blocks: m.
      objectives: K.
      device_local: whether every block lies on one device alone, and a device resolves only its
        own.
    """

    indices: BlockIndices
    groups: tuple[CallGroup, ...]
    num_blocks: int
    objectives: int
    device_local: bool

    @classmethod
    def of(
        cls,
        layouts: Sequence[Layout] | Mapping[int, Layout],
        rules: BlockRules,
        uses: Sequence[Use],
        topology: Topology,
        *,
        may_be_local: bool = False,
    ) -> CallBlocks:
        """Find the blocks of a call.

        Args:
          layouts: where arrays lie, by number.
          rules: how blocks are resolved.
          uses: what the call resolves.
          topology: the mesh.
          may_be_local: whether blocks that each lie on one device may be resolved by that device.
        """
        mine = [layouts[use.leaf] for use in uses]
        labels = [layout.block_labels for layout in mine]
        count = max((len(t) for t in labels), default=1)
        labels = [np.broadcast_to(t, (count, t.shape[1])) for t in labels]
        stacked = (use.layer for use, x in zip(uses, mine, strict=True) if x.layers is not None)
        layer = next(stacked, 0)
        axes = [layout.axis for layout in mine]
        device_local = may_be_local and _are_device_local(labels, axes, topology.pieces)
        if device_local:
            # A device meets the blocks of its own pieces only: one row per layer and device.
            labels = [np.repeat(t.reshape(-1, 1), t.shape[1], axis=1) for t in labels]
            layer = layer * topology.pieces + topology.piece_index()
            count *= topology.pieces
        # Per layer, the blocks met; a layer that meets fewer fills up with the spare row.
        met = [np.unique(np.concatenate([t[i] for t in labels] or [[]])) for i in range(count)]
        m = max(map(len, met))
        numbers = np.full((count, m), rules.num_blocks)
        for i, found in enumerate(met):
            numbers[i, : len(found)] = found
        local = [
            np.stack([np.searchsorted(met[i], t[i]) for i in range(count)]).astype(np.int32)
            for t in labels
        ]
        kinds = rules.group_of[numbers] if m else numbers  # [count, m]
        groups: list[CallGroup] = []
        members: list[jax.Array | None] = []
        for number, group in enumerate(rules.groups or ()):
            candidates = np.flatnonzero((kinds == number).any(0))
            if len(candidates):
                groups.append(CallGroup(number, group.aggregator, candidates))
                theirs = kinds[:, candidates]
                certain = ((theirs == number) | (theirs == -1)).all()
                members.append(None if certain else jnp.asarray(theirs == number)[layer])
        sparse = np.array([*rules.sparse, False])[numbers] if any(rules.sparse) else np.False_
        indices = BlockIndices(
            tuple(jnp.asarray(0 if u.layer is None else u.layer, jnp.int32) for u in uses),
            tuple(jnp.asarray(t)[layer] for t in local),
            jnp.asarray(numbers.astype(np.int32))[layer],
            tuple(members),
            jnp.asarray(sparse)[layer] if np.any(sparse) else None,
        )
        return cls(indices, tuple(groups), m, topology.objectives, device_local)

    def rows(self, table: BlockTable) -> BlockTable:
        """Take the call's rows from the table."""
        numbers = self.indices.numbers

        def take(column: jax.Array, rows: jax.Array) -> jax.Array:
            # On a GPU a slice, and its cotangent, is one launch; a gather of one row is three.
            if rows.shape == (1,):
                return jax.lax.dynamic_slice_in_dim(column, rows[0], 1)
            return column.at[rows].get(mode="promise_in_bounds")

        states = tuple(
            jax.tree.map(
                lambda t, c=group.candidates: take(t, numbers[..., c]), table.states[group.number]
            )
            for group in self.groups
        )
        return BlockTable(take(table.diagnostics, numbers), states)

    def new_rows(self, resolved: Resolution, members: Sequence[jax.Array | None]) -> BlockTable:
        """The rows' new values, to be returned as their cotangents."""
        diagnostics = Diagnostics(
            gram=resolved.gram,
            gram_error=resolved.gram_error,
            mean_norm=resolved.mean_norm,
            nonfinite=resolved.nonfinite.astype(jnp.float32),
            resolved=jnp.ones(self.num_blocks, jnp.float32),
            update_norm=resolved.update_norm,
            weights=resolved.weights,
        )

        def theirs(new: jax.Array, member: jax.Array | None) -> jax.Array:
            if member is None:
                return new
            return jnp.where(member.reshape(-1, *(1,) * (new.ndim - 1)), new, 0)

        states = tuple(
            jax.tree.map(lambda new, m=member: theirs(new, m), state)
            for state, member in zip(resolved.state, members, strict=True)
        )
        return BlockTable(diagnostics.packed(), states)

    def no_rows(self) -> BlockTable:
        """Rows of a call that resolves nothing."""
        return BlockTable(no_diagnostics(0, self.objectives), ())


def _are_device_local(
    labels: Sequence[np.ndarray], axes: Sequence[int | None], pieces: int
) -> bool:
    """Whether no block has parts on two devices, given labels [layers, parts] per array."""
    if pieces == 1 or not labels:
        return False
    if any(a != 0 or t.shape[1] != pieces for a, t in zip(axes, labels, strict=True)):
        return False
    owner: dict[int, int] = {}
    return all(
        owner.setdefault(int(label), part) == part
        for array in labels
        for layer in array
        for part, label in enumerate(layer)
    )
