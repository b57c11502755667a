"""One device's part of a step: its objectives, its examples, its pieces of the parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoo.dtypes import at_least_float32
from jaxmoo.engine.backward import Backward, Dynamic
from jaxmoo.engine.block import running
from jaxmoo.engine.layout import Layout, Topology
from jaxmoo.engine.tables import Rules, Tables, empty_report
from jaxmoo.mesh import DATA, FSDP, LANGUAGE
from jaxmoo.stacked import watched

__all__ = ["DevicePass"]


@dataclasses.dataclass(frozen=True, eq=False)
class DevicePass:
    """What ``shard_map`` runs on every device.

    Attributes:
      loss: ``(pieces of all arrays, their taps, batch of one objective) -> (sum of losses, aux)``.
      weight_fn: see :func:`jaxmoo.resolved_value_and_grad`.
      layouts: where every array lies, the trainable ones first.
      topology: the mesh.
      rules: how blocks are resolved.
      microbatches: parts of the batch, one after the other.
      accumulate: whether the parts' gradients are added up before they are resolved.
      tapped: numbers of the arrays resolved after the pass.
      tied: numbers of the tables that embed tokens and score them.
    """

    loss: Callable[..., jax.Array]
    weight_fn: Callable[[Any], jax.Array]
    layouts: Sequence[Layout]
    topology: Topology
    rules: Rules
    microbatches: int
    accumulate: bool
    tapped: frozenset[int]
    tied: frozenset[int]

    def __call__(
        self,
        values: list[jax.Array],
        frozen: list[jax.Array],
        batch: Any,
        key: jax.Array,
        state: tuple[Any, ...],
    ) -> tuple[jax.Array, Any, list[jax.Array], Tables]:
        """Compute losses and resolved gradients.

        Args:
          values: this device's pieces of the trainable arrays.
          frozen: those of the others.
          batch: this device's objectives and examples [K / L, B / (R F), ...], or [K / L].
          key: raw data of the step's PRNG key.
          state: aggregators' states, a row per block and one to spare.

        Returns:
          ``(losses [K / L], aux [K / L, ...], resolved gradients of the pieces, tables)``.
        """
        n, top = self.microbatches, self.topology
        apart: set[int] = set()  # known once a pass is traced
        one_pass = functools.partial(self._backward, values, frozen, apart=apart)
        complete = functools.partial(self._complete, apart=apart)
        weights, active = self._weights(batch)
        dynamic = Dynamic(key, active)
        if n == 1:
            losses, aux, updates, taps, tables = one_pass(batch, weights, dynamic, state)
            return losses, aux, *complete(updates, taps, dynamic, state, tables)

        def cut(x: jax.Array) -> jax.Array:
            if x.ndim == 1:  # of an objective, not of its examples
                return jnp.broadcast_to(x, (n, *x.shape))
            return jnp.moveaxis(x.reshape(x.shape[0], n, -1, *x.shape[2:]), 1, 0)

        parts = jax.tree.map(cut, batch)
        if self.accumulate:

            def add(total: Any, part: Any) -> tuple[Any, Any]:
                losses, aux, _, taps, _ = one_pass(part, weights, dynamic, state)
                return jax.tree.map(jnp.add, total, (losses, taps)), aux

            # Sums of many small numbers: in float32, whatever the gradients are sent in.
            zeros = jax.tree.map(
                lambda x: jnp.zeros(x.shape, at_least_float32(x.dtype)),
                (weights, self._taps(values)),
            )
            (losses, taps), aux = jax.lax.scan(add, zeros, parts)
            none = jax.tree.map(jnp.zeros_like, state)
            tables = Tables(empty_report(self.rules.num_blocks + 1, top.objectives), none)
            return losses, _sum(aux), *complete(values, taps, dynamic, state, tables)

        def each(carry: Any, numbered: Any) -> tuple[Any, Any]:
            losses, updates, report, state = carry
            number, part = numbered
            fold = jax.random.fold_in(jax.random.wrap_key_data(key), number)
            dynamic = Dynamic(jax.random.key_data(fold), active)
            # As large as a whole batch's: the mean over parts is then over the step's own weights.
            loss, aux, update, taps, tables = one_pass(part, weights / n, dynamic, state)
            update, tables = complete(update, taps, dynamic, state, tables)
            return (
                losses + loss / n,
                jax.tree.map(lambda total, u: total + u / n, updates, update),
                jax.tree.map(lambda total, x: total + x / n, report, tables.report),
                tables.state,
            ), aux

        start = (
            jnp.zeros(weights.shape, jnp.float32),
            [jnp.zeros(v.shape, at_least_float32(v.dtype)) for v in values],
            empty_report(self.rules.num_blocks + 1, top.objectives),
            state,
        )
        end, aux = jax.lax.scan(each, start, (jnp.arange(n), parts))
        losses, updates, report, state = end
        updates = [u.astype(v.dtype) for u, v in zip(updates, values, strict=True)]
        return losses, _sum(aux), updates, Tables(report, state)

    def _complete(
        self,
        updates: list[Any],
        taps: list[Any],
        dynamic: Dynamic,
        state: tuple[Any, ...],
        tables: Tables,
        *,
        apart: set[int],
    ) -> tuple[list[jax.Array], Tables]:
        """Resolve what the backward pass could not, and keep the state of blocks not resolved."""
        if apart:  # every device has the rows of its own blocks
            rows = np.array(sorted(apart))
            tables = jax.tree.map(lambda x: x.at[rows].set(self.topology.total(x[rows])), tables)
        if any(tap is not None for tap in taps):
            engine = Backward(
                self.layouts,
                self.topology,
                self.rules,
                tables=Tables(tables.report, state),
                dynamic=dynamic,
            )
            updates, tables = engine.resolve_late(updates, taps, tables)
        done = tables.report["resolved"] > 0

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(done.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        return updates, Tables(tables.report, jax.tree.map(keep, tables.state, state))

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

    def _taps(self, values: Sequence[jax.Array]) -> list[Any]:
        k = self.topology.objectives
        taps: list[Any] = []
        for number, value in enumerate(values):
            lead = int(self.layouts[number].layers is not None)
            shape = (*value.shape[:lead], k, *value.shape[lead:])
            dtype = self.layouts[number].gathered_dtype
            taps.append(jnp.zeros(shape, dtype) if number in self.tapped else None)
        return taps

    def _backward(
        self,
        values: list[jax.Array],
        frozen: list[jax.Array],
        batch: Any,
        weights: jax.Array,
        dynamic: Dynamic,
        state: tuple[Any, ...],
        *,
        apart: set[int],
    ) -> tuple[jax.Array, Any, list[jax.Array], list[Any], Tables]:
        """One forward and backward pass: losses, aux, gradients of pieces, taps, tables."""
        top = self.topology
        # Replicas that resolve on their own see their share as if it were everything.
        alone = self.rules.replicas != "mean_then_resolve"
        scale = jnp.where(weights > 0, 1 / jnp.where(weights > 0, weights, 1), 0)
        scale = scale * top.data if alone else scale

        def loss(differentiated: Any, batch: Any, scale: jax.Array) -> tuple[jax.Array, Any]:
            values, taps, tables = differentiated
            engine = Backward(
                self.layouts,
                top,
                self.rules,
                tapped=self.tapped,
                tied=self.tied,
                apart=apart,
                tables=tables,
                dynamic=dynamic,
            )
            taps = [*taps, *(None for _ in frozen)]
            with running(engine):
                value, aux = self.loss([*values, *frozen], taps, batch)
            return watched(value) * scale, aux

        tables = Tables(empty_report(self.rules.num_blocks + 1, top.objectives), state)
        inputs = (values, self._taps(values), tables)
        (losses, aux), (updates, taps, tables) = jax.vmap(
            jax.value_and_grad(loss, has_aux=True), in_axes=(None, 0, 0), out_axes=(0, None)
        )(inputs, batch, scale)
        losses = jnp.where(scale > 0, losses, 0)
        if alone:
            losses = losses / top.data
        if top.data * top.fsdp > 1:
            losses, aux = jax.lax.psum((losses, aux), (DATA, FSDP))
        return losses, aux, updates, taps, tables


def _sum(parts: Any) -> Any:
    """Add up what the parts of a batch gave, [n, ...]."""
    return jax.tree.map(lambda x: x.sum(0), parts)
