"""Resolving conflicts inside the backward pass.

Every block's parameters are gathered by one function with a hand-written derivative: forward it
makes whole arrays of the devices' pieces; backward it receives the gradients of all objectives on
this device, scatters them, resolves them, and returns the update of the device's own piece, already
in the layout of the parameters. Then the gradients are dropped.

The loss is differentiated one objective at a time and the whole is mapped over the objectives
(``vmap`` of ``grad``). The derivative therefore is written for one objective and contains one
operation, made with ``custom_vmap``, that under the map sees all of them.

What else enters and leaves the backward pass does so as inputs whose "gradient" is the new value:
the block table, of which a call takes its rows, and deferred arrays' cotangent accumulators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxmoo.block_solve import Group, Resolution, solve_blocks
from jaxmoo.blocks.sections import Section, of_sections
from jaxmoo.engine.block_rules import BlockRules
from jaxmoo.engine.block_table import BlockTable
from jaxmoo.engine.call_blocks import BlockIndices, CallBlocks
from jaxmoo.engine.layout import (
    Layout,
    Topology,
    gather,
    reduce_pieces,
    scatter,
    sections_of_piece,
    sections_of_whole,
)
from jaxmoo.engine.parameter import Parameter
from jaxmoo.engine.usage import Use
from jaxmoo.errors import ConfigError
from jaxmoo.kernels.reductions import weighted_sum
from jaxmoo.mesh import DATA, FSDP
from jaxmoo.resolve import resolve_sections
from jaxmoo.sketched import grams_of_sketches, sketch_blocks

__all__ = [
    "GATHERED",
    "Backward",
    "CallInputs",
    "StepInputs",
    "over_objectives",
    "sections_of_wholes",
]

# Name under which checkpoint policies know gathered parameters: they are never kept.
GATHERED = "jaxmoo_gathered"


class StepInputs(NamedTuple):
    """What the resolution reads besides gradients and states."""

    key: jax.Array  # raw PRNG key data
    active: jax.Array  # bool [K]


class CallInputs(NamedTuple):
    """What a call's backward step reads and has no derivative."""

    indices: BlockIndices | None  # None: the call resolves nothing
    step: StepInputs


class CallCotangents(NamedTuple):
    """What the backward step of a call gives."""

    updates: tuple[jax.Array, ...]  # of the arrays resolved in the pass, this device's pieces
    accumulators: tuple[jax.Array, ...]  # of deferred arrays, every objective's gradients
    rows: BlockTable  # new rows of the call's blocks


class Backward:
    """One backward pass of one device: what the calls of blocks in a loss function do.

    Args:
      layouts: where every array lies, by number.
      topology: the mesh.
      rules: how blocks are resolved.
      deferred: numbers of the arrays that are resolved after the pass.
      tied: numbers of the tables that embed tokens and score them.
      device_local: filled with the numbers of the device-local blocks.
      table: the block table.
      step: see :class:`StepInputs`.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        topology: Topology,
        rules: BlockRules,
        *,
        table: BlockTable,
        step: StepInputs,
        deferred: frozenset[int] = frozenset(),
        tied: frozenset[int] = frozenset(),
        device_local: set[int] | None = None,
    ) -> None:
        self.layouts = layouts
        self.topology = topology
        self.rules = rules
        self.deferred = deferred
        self.tied = tied
        self.device_local = set() if device_local is None else device_local
        self.table = table
        self.step = step

    def reads(self, leaf: Any) -> bool:
        """Whether a leaf of a block's parameters is one of them."""
        return isinstance(leaf, Parameter)

    def over_examples(self, tree: Any) -> Any:
        """Add up over the devices that hold other examples of the same objectives."""
        several = self.topology.data * self.topology.fsdp > 1
        return jax.lax.psum(tree, (DATA, FSDP)) if several else tree

    def whole(self, parameter: Parameter) -> jax.Array:
        """Gather a parameter, all layers of it, for reads outside of blocks."""
        if parameter.layer is None:
            return self.use([parameter])[0]
        return jax.lax.scan(lambda _, layer: (None, self.use([layer])[0]), None, parameter)[1]

    def use(self, parameters: Sequence[Parameter]) -> tuple[jax.Array, ...]:
        """Gather parameters that are used together; backward, resolve their blocks."""
        whole: dict[int, jax.Array] = {}
        trained: list[int] = []
        for at, parameter in enumerate(parameters):
            layout = self.layouts[parameter.leaf]
            if not layout.trained:
                whole[at] = jax.lax.stop_gradient(self.gather(parameter.value, layout))
            else:
                trained.append(at)
        if trained:
            mine = [parameters[at] for at in trained]
            whole |= dict(zip(trained, self._use_trained(mine), strict=True))
        return tuple(checkpoint_name(whole[at], GATHERED) for at in range(len(parameters)))

    def gather(self, piece: jax.Array, layout: Layout) -> jax.Array:
        """Make a whole array from the devices' pieces, in the dtype it is used in."""
        return gather(piece.astype(layout.gathered_dtype), layout.axis, self.topology)

    def _use_trained(self, parameters: Sequence[Parameter]) -> tuple[jax.Array, ...]:
        in_pass = [p for p in parameters if p.leaf not in self.deferred]
        deferred = [p for p in parameters if p.leaf in self.deferred]
        call = self.blocks_of([Use(p.leaf, p.layer) for p in in_pass])

        def gather_all(some: Sequence[Parameter], values: Any) -> tuple[jax.Array, ...]:
            pairs = zip(some, values, strict=True)
            return tuple(self.gather(x, self.layouts[p.leaf]) for p, x in pairs)

        @jax.custom_vjp
        def jaxmoo_gathered(
            values: Any,
            deferred_values: Any,
            accumulators: Any,
            rows: BlockTable,
            inputs: CallInputs,
        ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
            del accumulators, rows, inputs
            return gather_all(in_pass, values), gather_all(deferred, deferred_values)

        # By this name too checkpoint policies know it.
        use = jaxmoo_gathered

        def forward(
            values: Any,
            deferred_values: Any,
            accumulators: Any,
            rows: BlockTable,
            inputs: CallInputs,
        ) -> Any:
            return use(values, deferred_values, accumulators, rows, inputs), (rows.states, inputs)

        def backward(residuals: Any, cotangents: Any) -> Any:
            states, inputs = residuals
            resolve = functools.partial(self._resolve_call, in_pass, deferred, call)
            found = over_objectives(resolve, self.topology)(cotangents, states, inputs)
            pairs = zip(found.updates, in_pass, strict=True)
            updates = tuple(u.astype(p.value.dtype) for u, p in pairs)
            return updates, None, found.accumulators, found.rows, None

        use.defvjp(forward, backward)
        wholes = use(
            tuple(p.value for p in in_pass),
            tuple(p.value for p in deferred),
            tuple(p.accumulator for p in deferred),
            call.rows(self.table),
            CallInputs(call.indices, self.step),
        )
        first, second = map(iter, wholes)
        return tuple(next(second if p.leaf in self.deferred else first) for p in parameters)

    def _resolve_call(
        self,
        in_pass: Sequence[Parameter],
        deferred: Sequence[Parameter],
        call: CallBlocks,
        cotangents: tuple[Sequence[jax.Array], Sequence[jax.Array]],
        states: tuple[Any, ...],
        inputs: CallInputs,
    ) -> CallCotangents:
        """The backward step of one call, given the gradients [K / L, ...] of whole arrays."""
        layouts = [self.layouts[p.leaf] for p in in_pass]
        of_in_pass, of_deferred = cotangents
        accumulators = tuple(
            self.scatter(ct, self.layouts[p.leaf].axis).astype(p.accumulator.dtype)
            for ct, p in zip(of_deferred, deferred, strict=True)
        )
        indices = inputs.indices
        if self.rules.groups is None or indices is None or not in_pass:
            pairs = zip(of_in_pass, layouts, strict=True)
            updates = tuple(self.scatter(ct, x.axis)[0] for ct, x in pairs)
            return CallCotangents(updates, accumulators, call.no_rows())
        resolve = self._resolve_exact if self.rules.sketch is None else self.resolve_sketched
        leaves = [p.leaf for p in in_pass]
        resolved = resolve(of_in_pass, layouts, leaves, call, indices, states, inputs.step)
        rows = call.new_rows(resolved, indices.members)
        return CallCotangents(tuple(resolved.updates), accumulators, rows)

    def _resolve_exact(
        self,
        gradients: Sequence[jax.Array],
        layouts: Sequence[Layout],
        leaves: Sequence[int],
        call: CallBlocks,
        indices: BlockIndices,
        states: tuple[Any, ...],
        step: StepInputs,
    ) -> Resolution:
        """Exchange gradients and resolve their blocks; see :meth:`resolve_sketched`."""
        pieces = [self.scatter(x, y.axis)[:, None] for x, y in zip(gradients, layouts, strict=True)]
        sections = [
            sections_of_piece(x, layout, leaf, label[None], layer[None], self.topology)
            for x, layout, leaf, label, layer in zip(
                pieces, layouts, leaves, indices.labels, indices.layers, strict=True
            )
        ]
        resolved = self.resolve(sections, call, indices, states, step)
        updates = [
            update.reshape(layout.piece_shape(self.topology.pieces))
            for update, layout in zip(resolved.updates, layouts, strict=True)
        ]
        return resolved._replace(updates=updates)

    def resolve_sketched(
        self,
        gradients: Sequence[jax.Array],
        layouts: Sequence[Layout],
        leaves: Sequence[int],
        call: CallBlocks,
        indices: BlockIndices,
        states: tuple[Any, ...],
        step: StepInputs,
    ) -> Resolution:
        """Resolve blocks by sketches, which alone are exchanged.

        Args:
          gradients: per array, of this device's objectives and examples [K / L, ...].
          layouts: the arrays' layouts.
          leaves: their numbers.
          call: the blocks.
          indices: of the call.
          states: aggregators' states of the blocks.
          step: see :class:`StepInputs`.

        Returns:
          The resolution, with updates of this device's pieces.
        """
        top = self.topology
        sections = sections_of_wholes(gradients, leaves, indices)
        z = self.sketch(sections, indices, step)
        resolved = self.weigh(z, call, indices, states, step)
        weights = top.own(resolved.weights)
        updates = [
            reduce_pieces(
                weighted_sum(x.values, of_sections(weights, n), partitioned=False).reshape(
                    layout.shape
                ),
                layout.axis,
                top,
            )
            for x, n, layout in zip(sections, indices.labels, layouts, strict=True)
        ]
        return resolved._replace(updates=updates)

    def sketch(
        self, sections: Sequence[Section], indices: BlockIndices, step: StepInputs
    ) -> jax.Array:
        """Sketch gradients [k, ...] of a call's whole arrays: [k, B, m]."""
        assert self.rules.sketch is not None
        return sketch_blocks(
            sections,
            indices.numbers,
            self.rules.sketch,
            key=jax.random.wrap_key_data(step.key),
            platform=self.topology.platform,
        )

    def weigh(
        self,
        z: jax.Array,
        call: CallBlocks,
        indices: BlockIndices,
        states: tuple[Any, ...],
        step: StepInputs,
    ) -> Resolution:
        """Weigh the objectives of a call's blocks by this device's sketches [K / L, B, m].

        Returns:
          The resolution, without updates.
        """
        top, preference = self.topology, self.rules.preference
        fill = -z.shape[2] % (2 * top.pieces)
        # As gradients are: [K, B, m / pieces] of all objectives.
        z = self.scatter(jnp.pad(z, ((0, 0), (0, 0), (0, fill))), 1)
        grams = grams_of_sketches(z, total=top.total)
        return solve_blocks(
            grams,
            self._groups(call, indices),
            indices.numbers,
            state=states,
            key=jax.random.wrap_key_data(step.key),
            active=grams.taking_part(step.active, indices.sparse),
            preference=None if preference is None else jnp.asarray(preference),
            match_norm=self.rules.match_norm,
            platform=top.platform,
        )

    def _groups(self, call: CallBlocks, indices: BlockIndices) -> list[Group]:
        return [
            Group(group.aggregator, group.candidates, member)
            for group, member in zip(call.groups, indices.members, strict=True)
        ]

    def scatter(self, gradients: jax.Array, axis: int | None) -> jax.Array:
        """Objectives' gradients of this device's piece [K, ...], joined over replicas if asked."""
        return self.join(scatter(gradients, axis, self.topology))

    def join(self, gradients: jax.Array) -> jax.Array:
        """Add up objectives' gradients [K, ...] over replicas if asked."""
        if self.topology.data > 1 and self.rules.replicas == "mean_then_resolve":
            return jax.lax.psum(gradients, DATA)
        return gradients

    def resolve(
        self,
        sections: Sequence[Section],
        call: CallBlocks,
        indices: BlockIndices,
        states: tuple[Any, ...],
        step: StepInputs,
    ) -> Resolution:
        """Resolve blocks of which this device holds its pieces."""
        preference = self.rules.preference
        pooled = self.rules.replicas == "pooled_gram"
        resolved = resolve_sections(
            sections,
            self._groups(call, indices),
            indices.numbers,
            state=states,
            key=jax.random.wrap_key_data(step.key),
            active=step.active,
            preference=None if preference is None else jnp.asarray(preference),
            match_norm=self.rules.match_norm,
            partitioned=False,
            platform=self.topology.platform,
            sparse=indices.sparse,
            total=(lambda x: x) if call.device_local else self.topology.total,
            pooled=self.topology.replica_mean if pooled else lambda x: x,
        )
        if self.rules.replicas == "mean_then_resolve":
            return resolved
        shared = self.topology.replica_mean(
            resolved._replace(nonfinite=resolved.nonfinite.astype(jnp.float32))
        )
        return shared._replace(nonfinite=shared.nonfinite > 0)

    def blocks_of(self, uses: Sequence[Use]) -> CallBlocks:
        """Work out which blocks a call resolves; see :class:`CallBlocks`."""
        if self.rules.groups is None:
            uses = []
        call = CallBlocks.of(
            self.layouts, self.rules, uses, self.topology, may_be_local=self.rules.sketch is None
        )
        if call.device_local:
            labels = [self.layouts[use.leaf].block_labels for use in uses]
            self.device_local.update(int(label) for label in np.concatenate(labels).flat)
        return call


def sections_of_wholes(
    gradients: Sequence[jax.Array], leaves: Sequence[int], indices: BlockIndices
) -> list[Section]:
    """Cut gradients [k, ...] of a call's whole arrays into sections of its blocks."""
    return [
        sections_of_whole(x, leaf, label, layer)
        for x, leaf, label, layer in zip(
            gradients, leaves, indices.labels, indices.layers, strict=True
        )
    ]


def over_objectives(
    function: Callable[..., Any], topology: Topology, *, split: bool = False
) -> Callable[..., Any]:
    """Make an operation of one objective that sees all of this device's objectives at once.

    Args:
      function: ``(per objective [K / L, ...], *shared) -> result``, the same for all objectives.
      topology: the mesh.
      split: whether the result is ``(the same for all objectives, per objective [K / L, ...])``.

    Returns:
      A function ``(of one objective, *shared) -> result``, to be mapped over the objectives.
    """
    function = jax.jit(function, inline=True)  # traced once for both below

    @jax.custom_batching.custom_vmap
    def one(mapped: Any, *shared: Any) -> Any:
        # Only its shapes matter: the loss function is always mapped.
        result = function(
            jax.tree.map(
                lambda x: jnp.broadcast_to(x, (topology.local_objectives, *x.shape)), mapped
            ),
            *shared,
        )
        return (result[0], jax.tree.map(lambda x: x[0], result[1])) if split else result

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
        batched = jax.tree.map(lambda _: False, result)
        if split:
            batched = (batched[0], jax.tree.map(lambda _: True, result[1]))
        return result, batched

    return one
