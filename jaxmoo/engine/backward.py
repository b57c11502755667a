"""Resolving conflicts inside the backward pass.

Every block's parameters are gathered by one function with a hand-written derivative: forward it
makes whole arrays of the devices' pieces; backward it receives the gradients of all objectives on
this device, scatters them, resolves them, and returns the update of the device's own piece, already
in the layout of the parameters. Then the gradients are dropped.

The loss is differentiated one objective at a time and the whole is mapped over the objectives
(``vmap`` of ``grad``). The derivative therefore is written for one objective and contains one
operation, made with ``custom_vmap``, that under the map sees all of them.

What else enters and leaves the backward pass does so as inputs whose "gradient" is the new value:
the blocks' diagnostics and the aggregators' states. Each is a table with a row per block, from
which a call takes its rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxmoo.engine.layout import Layout, Topology, gather, scatter, sections_of_piece
from jaxmoo.engine.parameter import Parameter
from jaxmoo.engine.tables import CallBlocks, Rules, Tables
from jaxmoo.errors import ConfigError
from jaxmoo.mesh import DATA
from jaxmoo.resolve import Group, Resolution, Section, resolve_sections

__all__ = ["GATHERED", "Backward", "Dynamic", "over_objectives"]

# Name under which checkpoint policies know gathered parameters: they are never kept.
GATHERED = "jaxmoo_gathered"


class Dynamic(NamedTuple):
    """What the resolution reads besides gradients."""

    key: jax.Array  # raw PRNG key data
    active: jax.Array  # bool [K]


class Backward:
    """One backward pass of one device: what the calls of blocks in a loss function do.

    Args:
      layouts: where every parameter lies, by number.
      topology: the mesh.
      rules: how blocks are resolved.
      tapped: numbers of the arrays that are resolved after the pass.
      tied: numbers of the tables that embed tokens and score them.
      apart: filled with the blocks that each lie, and are resolved, on one device alone.
      tables: see the module.
      dynamic: see :class:`Dynamic`.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        topology: Topology,
        rules: Rules,
        *,
        tables: Tables,
        dynamic: Dynamic,
        tapped: frozenset[int] = frozenset(),
        tied: frozenset[int] = frozenset(),
        apart: set[int] | None = None,
    ) -> None:
        self.layouts = layouts
        self.topology = topology
        self.rules = rules
        self.tapped = tapped
        self.tied = tied
        self.apart = set() if apart is None else apart
        self.tables = tables
        self.dynamic = dynamic

    def reads(self, leaf: Any) -> bool:
        """Whether a leaf of a block's parameters is one of them."""
        return isinstance(leaf, Parameter)

    def whole(self, parameter: Parameter) -> jax.Array:
        """Gather a parameter, all layers of it, for reads outside of blocks."""
        if parameter.layer is None:
            return self.use([parameter])[0]
        return jax.lax.scan(lambda _, layer: (None, self.use([layer])[0]), None, parameter)[1]

    def use(self, parameters: Sequence[Parameter]) -> tuple[jax.Array, ...]:
        """Gather parameters that are used together; backward, resolve their blocks."""
        whole: dict[int, jax.Array] = {}
        trained = []
        for at, parameter in enumerate(parameters):
            layout = self.layouts[parameter.leaf]
            if layout.labels is None:
                whole[at] = jax.lax.stop_gradient(self.gather(parameter.value, layout))
            else:
                trained.append(at)
        if trained:
            mine = [parameters[at] for at in trained]
            whole |= dict(zip(trained, self._use_trained(mine), strict=True))
        return tuple(checkpoint_name(whole[at], GATHERED) for at in range(len(parameters)))

    def gather(self, piece: jax.Array, layout: Layout) -> jax.Array:
        """Make a whole array from the devices' pieces, in the dtype it is used in."""
        return gather(piece.astype(layout.gathered_dtype), layout.axis)

    def _use_trained(self, parameters: Sequence[Parameter]) -> tuple[jax.Array, ...]:
        in_pass = [p for p in parameters if p.leaf not in self.tapped]
        call = self.blocks_of([(p.leaf, p.layer) for p in in_pass])

        @jax.custom_vjp
        def jaxmoo_gathered(
            values: Any, taps: Any, tables: Tables, integers: Any
        ) -> tuple[jax.Array, ...]:
            del taps, tables, integers
            layouts = [self.layouts[p.leaf] for p in parameters]
            return tuple(map(self.gather, values, layouts))

        # By this name too checkpoint policies know it.
        use = jaxmoo_gathered

        def forward(values: Any, taps: Any, tables: Tables, integers: Any) -> Any:
            return use(values, taps, tables, integers), (tables.state, integers)

        def backward(residuals: Any, cotangents: tuple[jax.Array, ...]) -> Any:
            state, integers = residuals
            updates, taps, tables = over_objectives(
                functools.partial(self._resolve_call, parameters, call), self.topology
            )(cotangents, state, integers)
            values = tuple(
                u if u is None else u.astype(p.value.dtype)
                for u, p in zip(updates, parameters, strict=True)
            )
            return values, taps, tables, None

        use.defvjp(forward, backward)
        return use(
            tuple(p.value for p in parameters),
            tuple(p.tap for p in parameters),
            call.rows(self.tables),
            (call.integers, self.dynamic),
        )

    def _resolve_call(
        self,
        parameters: Sequence[Parameter],
        call: CallBlocks,
        cotangents: Any,
        state: Any,
        ints: Any,
    ) -> tuple[tuple[Any, ...], tuple[Any, ...], Tables]:
        """The backward pass of one call, given the gradients [K / L, ...] of whole arrays."""
        (layers, labels, numbers, member), dynamic = ints
        updates: list[Any] = []
        taps: list[Any] = []
        sections = []
        at = 0
        for parameter, ct in zip(parameters, cotangents, strict=True):
            layout = self.layouts[parameter.leaf]
            gradients = self.scatter(ct, layout.axis)
            if parameter.leaf in self.tapped:
                taps.append(gradients.astype(parameter.tap.dtype))
                updates.append(None)
            elif self.rules.groups is None:
                taps.append(None)
                updates.append(gradients[0])
            else:
                taps.append(None)
                updates.append(len(sections))
                sections.append(
                    sections_of_piece(
                        gradients[:, None],
                        layout,
                        parameter.leaf,
                        labels[at][None],
                        layers[at][None],
                        self.topology,
                    )
                )
                at += 1
        if not sections:
            return tuple(updates), tuple(taps), call.no_rows()
        resolved = self.resolve(sections, call, numbers, member, state, dynamic)
        for place, (parameter, update) in enumerate(zip(parameters, updates, strict=True)):
            if update is not None:
                shape = self.layouts[parameter.leaf].piece_shape(self.topology.pieces)
                updates[place] = resolved.updates[update].reshape(shape)
        return tuple(updates), tuple(taps), call.new_rows(resolved, member)

    def scatter(self, gradients: jax.Array, axis: int | None) -> jax.Array:
        """Objectives' gradients of this device's piece [K, ...], joined over replicas if asked."""
        x = scatter(gradients, axis, self.topology)
        if self.topology.data > 1 and self.rules.replicas == "mean_then_resolve":
            x = jax.lax.psum(x, DATA)
        return x

    def resolve(
        self,
        sections: Sequence[Section],
        call: CallBlocks,
        numbers: jax.Array,
        member: Sequence[Any],
        state: Any,
        dynamic: Dynamic,
    ) -> Resolution:
        """Resolve blocks of which this device holds its pieces."""
        groups = [
            Group(aggregator, blocks, m)
            for (_, aggregator, blocks), m in zip(call.groups, member, strict=True)
        ]
        preference = self.rules.preference
        pooled = self.rules.replicas == "pooled_gram"
        resolved = resolve_sections(
            sections,
            groups,
            numbers,
            state=state,
            key=jax.random.wrap_key_data(dynamic.key),
            active=dynamic.active,
            preference=None if preference is None else jnp.asarray(preference),
            match_norm=self.rules.match_norm,
            partitioned=False,
            platform=self.topology.platform,
            total=(lambda x: x) if call.apart else self.topology.total,
            pooled=self.topology.replica_mean if pooled else lambda x: x,
        )
        if self.rules.replicas == "mean_then_resolve":
            return resolved
        shared = self.topology.replica_mean(
            resolved._replace(nonfinite=resolved.nonfinite.astype(jnp.float32))
        )
        return shared._replace(nonfinite=shared.nonfinite > 0)

    def resolve_late(
        self, updates: list[Any], taps: Sequence[Any], tables: Tables
    ) -> tuple[list[jax.Array], Tables]:
        """Resolve the blocks whose gradients came out of the pass through taps.

        Args:
          updates: resolved gradients of the other arrays.
          taps: per array, the objectives' gradients [layers, K, *piece] or [K, *piece], or None.
          tables: what the pass gave.

        Returns:
          The updates of all arrays, and the tables with these blocks' rows.
        """
        late = [leaf for leaf, tap in enumerate(taps) if tap is not None]
        # As if every stack were one array with all its layers' sections.
        flat = {
            leaf: dataclasses.replace(
                self.layouts[leaf], labels=self.layouts[leaf].labels.reshape(1, -1), layers=None
            )
            for leaf in late
        }
        call = CallBlocks.of(
            flat, self.rules, [(leaf, None) for leaf in late], self.topology.objectives
        )
        _, labels, numbers, member = call.integers
        sections = []
        for leaf, label in zip(late, labels, strict=True):
            layout, tap = self.layouts[leaf], taps[leaf]
            tap = tap[:, None] if layout.layers is None else jnp.moveaxis(tap, 0, 1)
            count = tap.shape[1]
            sections.append(
                sections_of_piece(
                    tap, layout, leaf, label.reshape(count, -1), np.arange(count), self.topology
                )
            )
        state = call.rows(self.tables).state
        resolved = self.resolve(sections, call, numbers, member, state, self.dynamic)
        updates = list(updates)
        for leaf, update in zip(late, resolved.updates, strict=True):
            layout = self.layouts[leaf]
            lead = () if layout.layers is None else (layout.layers,)
            shape = (*lead, *layout.piece_shape(self.topology.pieces))
            updates[leaf] = update.reshape(shape).astype(layout.dtype)
        rows = call.new_rows(resolved, member)
        report = {name: t.at[numbers].add(rows.report[name]) for name, t in tables.report.items()}
        states = list(tables.state)
        for (group, _, candidates), new in zip(call.groups, rows.state, strict=True):
            states[group] = jax.tree.map(
                lambda t, x, c=candidates: t.at[numbers[c]].add(x), states[group], new
            )
        return updates, Tables(report, tuple(states))

    def blocks_of(self, uses: Sequence[tuple[int, Any]]) -> CallBlocks:
        """Work out which blocks a call resolves; see :class:`CallBlocks`."""
        if self.rules.groups is None:
            uses = []
        top = self.topology
        call = CallBlocks.of(self.layouts, self.rules, uses, top.objectives, top)
        if call.apart:
            labels = [self.layouts[leaf].labels for leaf, _ in uses]
            self.apart.update(int(label) for label in np.concatenate(labels).flat)
        return call


def over_objectives(function: Callable[..., Any], topology: Topology) -> Callable[..., Any]:
    """Make an operation of one objective that sees all of this device's objectives at once.

    Args:
      function: ``(per objective [K / L, ...], *shared) -> result``, the same for all objectives.
      topology: the mesh.

    Returns:
      A function ``(of one objective, *shared) -> result``, to be mapped over the objectives.
    """

    @jax.custom_batching.custom_vmap
    def one(mapped: Any, *shared: Any) -> Any:
        # Only its shapes matter: the loss function is always mapped.
        return function(
            jax.tree.map(
                lambda x: jnp.broadcast_to(x, (topology.local_objectives, *x.shape)), mapped
            ),
            *shared,
        )

    @one.def_vmap
    def _(size: int, batched: Sequence[Any], mapped: Any, *shared: Any) -> tuple[Any, Any]:
        if size != topology.local_objectives or any(jax.tree.leaves(batched[1:])):
            raise ConfigError(
                "A block was called inside a vmap of the loss function's own. Call it on the whole "
                "array instead; the engine maps the loss function over the objectives itself."
            )
        mapped = jax.tree.map(
            lambda x, b: x if b else jnp.broadcast_to(x, (size, *x.shape)), mapped, batched[0]
        )
        result = function(mapped, *shared)
        return result, jax.tree.map(lambda _: False, result)

    return one
