"""Which blocks a call resolves, and their rows in the tables of all blocks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoo.aggregators import Aggregator
from jaxmoo.engine.layout import Layout, Topology
from jaxmoo.resolve import Group, Resolution

__all__ = ["CallBlocks", "Rules", "Tables", "empty_report"]


class Tables(NamedTuple):
    """Rows that go in and come out of the backward pass, one per block and one to spare."""

    report: dict[str, jax.Array]
    state: tuple[Any, ...]  # per group of blocks, the aggregator's state


@dataclasses.dataclass(frozen=True, eq=False)
class Rules:
    """How blocks are resolved: the same for all of them.

    Attributes:
      groups: blocks by aggregator; None for the plain sum of gradients.
      num_blocks: B.
      preference: weights of the objectives [K], or None.
      match_norm: see :func:`jaxmoo.resolve_conflicts`.
      replicas: how the gradients of replicas are joined; see ``resolved_value_and_grad``.
    """

    groups: Sequence[Group] | None
    num_blocks: int
    preference: np.ndarray | None
    match_norm: bool
    replicas: str

    @functools.cached_property
    def group_of(self) -> np.ndarray:
        """The group of each block, int [B + 1]; -1 for the spare row."""
        found = np.full(self.num_blocks + 1, -1)
        for number, group in enumerate(self.groups or ()):
            found[np.asarray(group.blocks)] = number
        return found


def empty_report(rows: int, objectives: int) -> dict[str, jax.Array]:
    """A table of zeros for the diagnostics of as many blocks."""
    k = objectives
    shapes = {"gram": (k, k), "weights": (k,), "nonfinite": (k,)}
    names = ("gram", "weights", "update_norm", "mean_norm", "nonfinite", "resolved")
    return {name: jnp.zeros((rows, *shapes.get(name, ())), jnp.float32) for name in names}


class CallBlocks(NamedTuple):
    """The blocks one call resolves, which may depend on the layer it is called for.

    Attributes:
      integers: arrays (layers [leaves], labels per leaf [parts] into the call's blocks, numbers
        [m] of the blocks among all, membership per group).
      groups: (number among all groups, aggregator, candidates among the call's blocks).
      num_blocks: m.
      objectives: K.
      apart: whether every block lies on one device alone, and a device resolves only its own.
    """

    integers: Any
    groups: list[tuple[int, Aggregator, np.ndarray]]
    num_blocks: int
    objectives: int
    apart: bool

    @classmethod
    def of(
        cls,
        layouts: Sequence[Layout] | Mapping[int, Layout],
        rules: Rules,
        uses: Sequence[tuple[int, Any]],
        objectives: int,
        topology: Topology | None = None,
    ) -> CallBlocks:
        """Find the blocks of a call.

        Args:
          layouts: where parameters lie, by number.
          rules: how blocks are resolved.
          uses: the arrays the call resolves, with the number of the layer.
          objectives: K.
          topology: the mesh, for calls whose blocks may each lie on one device alone.
        """
        tables = [layouts[leaf].labels for leaf, _ in uses]
        count = max((len(t) for t in tables), default=1)
        tables = [np.broadcast_to(t, (count, t.shape[1])) for t in tables]
        layer = next((n for leaf, n in uses if layouts[leaf].layers is not None), 0)
        axes = [layouts[leaf].axis for leaf, _ in uses]
        apart = topology is not None and _lie_apart(tables, axes, topology.pieces)
        if apart:
            # A device meets the blocks of its own pieces only: one row per layer and device.
            tables = [np.repeat(t.reshape(-1, 1), t.shape[1], axis=1) for t in tables]
            layer = layer * topology.pieces + topology.piece_index()
            count *= topology.pieces
        # Per layer, the blocks met; a layer that meets fewer fills up with the spare row.
        met = [np.unique(np.concatenate([t[i] for t in tables] or [[]])) for i in range(count)]
        m = max(map(len, met))
        numbers = np.full((count, m), rules.num_blocks)
        for i, found in enumerate(met):
            numbers[i, : len(found)] = found
        local = [
            np.stack([np.searchsorted(met[i], t[i]) for i in range(count)]).astype(np.int32)
            for t in tables
        ]
        kinds = rules.group_of[numbers] if m else numbers  # [count, m]
        groups, members = [], []
        for number, group in enumerate(rules.groups or ()):
            candidates = np.flatnonzero((kinds == number).any(0))
            if len(candidates):
                groups.append((number, group.aggregator, candidates))
                mine = kinds[:, candidates]
                certain = ((mine == number) | (mine == -1)).all()
                members.append(None if certain else jnp.asarray(mine == number)[layer])
        integers = (
            tuple(jnp.asarray(0 if n is None else n, jnp.int32) for _, n in uses),
            tuple(jnp.asarray(t)[layer] for t in local),
            jnp.asarray(numbers.astype(np.int32))[layer],
            tuple(members),
        )
        return cls(integers, groups, m, objectives, apart)

    def rows(self, tables: Tables) -> Tables:
        """Take the call's rows from the tables."""
        numbers = self.integers[2]
        report = {name: table[numbers] for name, table in tables.report.items()}
        state = tuple(
            jax.tree.map(lambda t, c=candidates: t[numbers[..., c]], tables.state[group])
            for group, _, candidates in self.groups
        )
        return Tables(report, state)

    def new_rows(self, resolved: Resolution, member: Sequence[Any]) -> Tables:
        """The rows' new values, to be returned as their cotangents."""
        report = {
            "gram": resolved.gram,
            "weights": resolved.weights,
            "update_norm": resolved.update_norm,
            "mean_norm": resolved.mean_norm,
            "nonfinite": resolved.nonfinite.astype(jnp.float32),
            "resolved": jnp.ones(self.num_blocks, jnp.float32),
        }

        def mine(new: jax.Array, m: Any) -> jax.Array:
            return new if m is None else jnp.where(m.reshape(-1, *(1,) * (new.ndim - 1)), new, 0)

        state = tuple(
            jax.tree.map(lambda new, m=m: mine(new, m), s)
            for s, m in zip(resolved.state, member, strict=True)
        )
        return Tables(report, state)

    def no_rows(self) -> Tables:
        """Rows of a call that resolves nothing."""
        return Tables(empty_report(0, self.objectives), ())


def _lie_apart(tables: Sequence[np.ndarray], axes: Sequence[int | None], pieces: int) -> bool:
    """Whether no block has parts on two devices, given labels [layers, parts] per array."""
    if pieces == 1 or not tables:
        return False
    if any(a != 0 or t.shape[1] != pieces for a, t in zip(axes, tables, strict=True)):
        return False
    owner: dict[int, int] = {}
    return all(
        owner.setdefault(int(label), part) == part
        for table in tables
        for labels in table
        for part, label in enumerate(labels)
    )
