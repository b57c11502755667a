"""One device's part of a step: its objectives, its examples, its pieces of the parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoo.dtypes import at_least_float32
from jaxmoo.engine.backward import Backward, StepInputs
from jaxmoo.engine.block import running
from jaxmoo.engine.block_rules import BlockRules
from jaxmoo.engine.block_table import BlockTable, Diagnostics, no_diagnostics
from jaxmoo.engine.deferred import resolve_deferred
from jaxmoo.engine.layout import Layout, Topology
from jaxmoo.kernels.product import exchanging
from jaxmoo.mesh import DATA, FSDP, LANGUAGE
from jaxmoo.stacked import watched

__all__ = ["DevicePass"]


class PassResult(NamedTuple):
    """What one forward and backward pass of a device gives; see :class:`DevicePass`."""

    losses: jax.Array  # [K / L]
    aux: Any  # [K / L, ...]
    updates: list[jax.Array]  # resolved gradients of the pieces, zero for deferred arrays
    accumulators: dict[int, jax.Array]  # by number of the deferred array, objectives' gradients
    table: BlockTable


@dataclasses.dataclass(frozen=True, eq=False)
class DevicePass:
    """What ``shard_map`` runs on every device.

    Attributes:
      loss: ``(pieces of all arrays, cotangent accumulators by array, batch of one objective) ->
        (sum of losses, aux)``.
      weight_fn: see :func:`jaxmoo.resolved_value_and_grad`.
      layouts: where every array lies, the trainable ones first.
      topology: the mesh.
      rules: how blocks are resolved.
      microbatches: parts of the batch, one after the other.
      accumulate: whether the parts' gradients are added up before they are resolved.
      deferred: numbers of the arrays resolved after the pass.
      tied: numbers of the tables that embed tokens and score them.
    """

    loss: Callable[..., tuple[jax.Array, Any]]
    weight_fn: Callable[[Any], jax.Array]
    layouts: Sequence[Layout]
    topology: Topology
    rules: BlockRules
    microbatches: int
    accumulate: bool
    deferred: frozenset[int]
    tied: frozenset[int]

    def __call__(
        self,
        values: list[jax.Array],
        frozen: list[jax.Array],
        batch: Any,
        key: jax.Array,
        states: tuple[Any, ...],
    ) -> tuple[jax.Array, Any, list[jax.Array], BlockTable]:
        """Compute losses and resolved gradients.

        Args:
          values: this device's pieces of the trainable arrays.
          frozen: those of the others.
          batch: this device's objectives and examples [K / L, B / (R F), ...], or [K / L].
          key: raw data of the step's PRNG key.
          states: aggregators' states, a row per block and one to spare.

        Returns:
          ``(losses [K / L], aux [K / L, ...], resolved gradients of the pieces, table)``.
        """
        n, top = self.microbatches, self.topology
        device_local: set[int] = set()  # known once a pass is traced
        one_pass = functools.partial(self._backward, values, frozen, device_local=device_local)
        complete = functools.partial(self._complete, device_local=device_local)
        weights, active = self._weights(batch)
        step = StepInputs(key, active)
        if n == 1:
            found = one_pass(batch, weights, step, states)
            updates, table = complete(found, step, states)
            return found.losses, found.aux, updates, table

        def cut(x: jax.Array) -> jax.Array:
            if x.ndim == 1:  # of an objective, not of its examples
                return jnp.broadcast_to(x, (n, *x.shape))
            return jnp.moveaxis(x.reshape(x.shape[0], n, -1, *x.shape[2:]), 1, 0)

        parts = jax.tree.map(cut, batch)
        nothing = no_diagnostics(self.rules.num_blocks + 1, top.objectives)
        if self.accumulate:

            def add(total: Any, part: Any) -> tuple[Any, Any]:
                found = one_pass(part, weights, step, states)
                return jax.tree.map(jnp.add, total, (found.losses, found.accumulators)), found.aux

            # Sums of many small numbers: in float32, whatever the gradients are sent in.
            zeros = jax.tree.map(
                lambda x: jnp.zeros(x.shape, at_least_float32(x.dtype)),
                (weights, self._accumulators(values)),
            )
            (losses, accumulators), aux = jax.lax.scan(add, zeros, parts)
            table = BlockTable(nothing, jax.tree.map(jnp.zeros_like, states))
            found = PassResult(losses, _sum(aux), values, accumulators, table)
            updates, table = complete(found, step, states)
            return found.losses, found.aux, updates, table

        def each(carry: Any, numbered: Any) -> tuple[Any, Any]:
            losses, updates, diagnostics, states = carry
            number, part = numbered
            fold = jax.random.fold_in(jax.random.wrap_key_data(key), number)
            step = StepInputs(jax.random.key_data(fold), active)
            # As large as a whole batch's: the mean over parts is then over the step's own weights.
            found = one_pass(part, weights / n, step, states)
            update, table = complete(found, step, states)
            return (
                losses + found.losses / n,
                jax.tree.map(lambda total, u: total + u / n, updates, update),
                diagnostics + table.diagnostics / n,
                table.states,
            ), found.aux

        start = (
            jnp.zeros(weights.shape, jnp.float32),
            [jnp.zeros(v.shape, at_least_float32(v.dtype)) for v in values],
            nothing,
            states,
        )
        end, aux = jax.lax.scan(each, start, (jnp.arange(n), parts))
        losses, updates, diagnostics, states = end
        updates = [u.astype(v.dtype) for u, v in zip(updates, values, strict=True)]
        return losses, _sum(aux), updates, BlockTable(diagnostics, states)

    def _complete(
        self,
        found: PassResult,
        step: StepInputs,
        states: tuple[Any, ...],
        *,
        device_local: set[int],
    ) -> tuple[list[jax.Array], BlockTable]:
        """Resolve what the backward pass could not, and keep the state of blocks not resolved."""
        updates, table = found.updates, found.table
        if device_local:  # every device has the rows of its own blocks
            rows = np.array(sorted(device_local))
            table = jax.tree.map(lambda x: x.at[rows].set(self.topology.total(x[rows])), table)
        if found.accumulators:
            engine = Backward(
                self.layouts,
                self.topology,
                self.rules,
                table=BlockTable(table.diagnostics, states),
                step=step,
            )
            updates, table = resolve_deferred(engine, updates, found.accumulators, table)
        done = Diagnostics.of(table.diagnostics, self.topology.objectives).resolved > 0
        done = jnp.append(done, False)

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(done.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        return updates, BlockTable(table.diagnostics, jax.tree.map(keep, table.states, states))

    def _weights(self, batch: Any) -> tuple[jax.Array, jax.Array]:
        """Weights of this device's objectives [K / L], and which of all K are present."""
        top = self.topology
        weights = jax.vmap(self.weight_fn)(batch).astype(jnp.float32)
        if top.data * top.fsdp > 1:
            weights = jax.lax.psum(weights, (DATA, FSDP))
        everyone = weights
        if top.language > 1:
            everyone = jax.lax.all_gather(weights, LANGUAGE, tiled=True)
        present = everyone > 0
        if top.local_objectives * top.language > top.objectives:  # places without an objective
            first = jax.lax.axis_index(LANGUAGE) * top.local_objectives
            real = first + jnp.arange(top.local_objectives) < top.objectives
            weights = jnp.where(real, weights, 0)
        return weights, present[: top.objectives]

    def _accumulators(self, values: Sequence[jax.Array]) -> dict[int, jax.Array]:
        """Cotangent accumulators of deferred arrays, by number."""

        def zeros(number: int) -> jax.Array:
            layout, shape = self.layouts[number], values[number].shape
            lead = int(layout.layers is not None)
            shape = (*shape[:lead], self.topology.objectives, *shape[lead:])
            return jnp.zeros(shape, layout.gathered_dtype)

        return {number: zeros(number) for number in sorted(self.deferred)}

    def _backward(
        self,
        values: list[jax.Array],
        frozen: list[jax.Array],
        batch: Any,
        weights: jax.Array,
        step: StepInputs,
        states: tuple[Any, ...],
        *,
        device_local: set[int],
    ) -> PassResult:
        """One forward and backward pass."""
        top = self.topology
        # Replicas that resolve on their own see their share as if it were everything.
        alone = self.rules.replicas != "mean_then_resolve"
        scale = jnp.where(weights > 0, 1 / jnp.where(weights > 0, weights, 1), 0)
        scale = scale * top.data if alone else scale
        exchanged = self.rules.sketch is None  # gradients, not their sum
        several = top.tpu and top.language > 1 and top.local_objectives > 1 and exchanged
        pieces = top.pieces if several else 1

        def loss(differentiated: Any, batch: Any, scale: jax.Array) -> tuple[jax.Array, Any]:
            values, accumulators, table = differentiated
            engine = Backward(
                self.layouts,
                top,
                self.rules,
                deferred=self.deferred,
                tied=self.tied,
                device_local=device_local,
                table=table,
                step=step,
            )
            with running(engine), exchanging(pieces):
                value, aux = self.loss([*values, *frozen], accumulators, batch)
            return watched(value) * scale, aux

        diagnostics = no_diagnostics(self.rules.num_blocks + 1, top.objectives)
        inputs = (values, self._accumulators(values), BlockTable(diagnostics, states))
        (losses, aux), (updates, accumulators, table) = jax.vmap(
            jax.value_and_grad(loss, has_aux=True), in_axes=(None, 0, 0), out_axes=(0, None)
        )(inputs, batch, scale)
        losses = jnp.where(scale > 0, losses, 0)
        if alone:
            losses = losses / top.data
        if top.data * top.fsdp > 1:
            losses, aux = jax.lax.psum((losses, aux), (DATA, FSDP))
        return PassResult(losses, aux, updates, accumulators, table)


def _sum(parts: Any) -> Any:
    """Add up what the parts of a batch gave, [n, ...]."""
    return jax.tree.map(lambda x: x.sum(0), parts)
