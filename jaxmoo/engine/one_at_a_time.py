"""Calls of blocks of which no two objectives' gradients exist at one time.

The backward step of such a call is run up to what gradients are made of
(:mod:`jaxmoo.engine.in_parts`). Then every objective's gradients are formed, sketched and dropped;
the sketches give the weights; and the weighted sum is formed at once, from factors that carry them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxmoo.engine.backward import Backward, CallInputs, over_objectives, sections_of_wholes
from jaxmoo.engine.block_table import BlockTable
from jaxmoo.engine.call_blocks import CallBlocks
from jaxmoo.engine.in_parts import backward_in_parts
from jaxmoo.engine.layout import Layout, reduce_pieces
from jaxmoo.engine.parameter import Parameter
from jaxmoo.engine.usage import Use

__all__ = ["call_one_at_a_time", "can_be_taken_apart"]


class _Cotangents(NamedTuple):
    """What the backward step of a call gives."""

    updates: tuple[jax.Array, ...]  # of the device's pieces
    rows: BlockTable


def can_be_taken_apart(engine: Any, parameters: Sequence[Parameter]) -> bool:
    """Whether a call's gradients are to be formed one at a time, and can be.

    Args:
      engine: the current one.
      parameters: that the call reads.
    """
    if not isinstance(engine, Backward) or engine.rules.keep != "one":
        return False
    trained = [p for p in parameters if engine.layouts[p.leaf].trained]
    return (
        bool(trained)
        and engine.topology.local_objectives > 1
        and not any(p.leaf in engine.deferred for p in trained)
        # An array that lies in several blocks has no one weight per objective.
        and all(engine.layouts[p.leaf].block_labels.shape[1] == 1 for p in trained)
    )


def call_one_at_a_time(
    engine: Backward,
    function: Callable[[list[Any], list[Any]], Any],
    parameters: Sequence[Parameter],
    given: Sequence[Any],
    *,
    barrier: bool,
) -> Any:
    """Call a function of parameters in the loss function of one objective.

    Args:
      engine: the current one.
      function: ``(whole parameters, given) -> results``.
      parameters: what devices hold of the parameters.
      given: arrays.
      barrier: whether the compiler must be kept from merging the backward pass, which computes
        the call anew, with the forward pass.
    """
    layouts = [engine.layouts[p.leaf] for p in parameters]
    wholes = [jax.ShapeDtypeStruct(x.shape, x.gathered_dtype) for x in layouts]
    traced, shape = jax.make_jaxpr(function, return_shape=True)(wholes, list(given))
    # What the function reads besides its arguments becomes one of them.
    given = [*given, *traced.consts]
    smooth = [jnp.issubdtype(x.dtype, jnp.inexact) for x in traced.out_avals]

    def run(wholes: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        start = len(given) - len(traced.consts)
        closed = core.ClosedJaxpr(traced.jaxpr, list(given[start:]))
        return core.jaxpr_as_fun(closed)(*wholes, *given[:start])

    call = _Call(engine, parameters, layouts, run, smooth)

    @jax.custom_vjp
    def once(values: Any, rows: BlockTable, inputs: CallInputs, given: Any) -> list[Any]:
        del rows, inputs
        return run(call.gathered(values), given)

    def forward(values: Any, rows: BlockTable, inputs: CallInputs, given: Any) -> Any:
        return once(values, rows, inputs, given), (values, rows.states, inputs, given)

    def backward(residuals: Any, cotangents: Any) -> Any:
        if barrier:
            residuals = jax.lax.optimization_barrier(residuals)
        values, states, inputs, given = residuals
        above = [ct for ct, use in zip(cotangents, smooth, strict=True) if use]
        found, of_given = over_objectives(call.resolve, engine.topology, split=True)(
            (given, above), values, states, inputs
        )
        updates, floats = iter(found.updates), iter(of_given)
        return (
            [next(updates) if x.trained else None for x in layouts],
            found.rows,
            None,
            [next(floats) if jnp.issubdtype(x.dtype, jnp.inexact) else None for x in given],
        )

    once.defvjp(forward, backward)
    results = once(
        [p.value for p in parameters],
        call.blocks.rows(engine.table),
        CallInputs(call.blocks.indices, engine.step),
        given,
    )
    return jax.tree.unflatten(jax.tree.structure(shape), results)


class _Call:
    """One call, with the blocks of its trained parameters."""

    def __init__(
        self,
        engine: Backward,
        parameters: Sequence[Parameter],
        layouts: Sequence[Layout],
        run: Callable[[Sequence[Any], Sequence[Any]], list[Any]],
        smooth: Sequence[bool],
    ) -> None:
        self.engine, self.layouts, self.run, self.smooth = engine, layouts, run, smooth
        pairs = zip(parameters, layouts, strict=True)
        self.trained = [p for p, layout in pairs if layout.trained]
        self.blocks: CallBlocks = engine.blocks_of([Use(p.leaf, p.layer) for p in self.trained])

    def gathered(self, values: Sequence[jax.Array]) -> list[jax.Array]:
        """Whole arrays of the parameters."""
        return [
            self.engine.gather(x, layout) for x, layout in zip(values, self.layouts, strict=True)
        ]

    def resolve(
        self,
        mapped: tuple[Sequence[jax.Array], Sequence[jax.Array]],
        values: Sequence[jax.Array],
        states: tuple[Any, ...],
        inputs: CallInputs,
    ) -> tuple[_Cotangents, list[Any]]:
        """The backward step, given arguments and cotangents of all objectives [K / L, ...].

        Returns:
          What is the same for all of them, and the cotangents of the arguments that have any.
        """
        engine, (given, above) = self.engine, mapped
        assert inputs.indices is not None and engine.rules.sketch is not None
        wholes = self.gathered(values)
        smooth = [jnp.issubdtype(x.dtype, jnp.inexact) for x in given]

        def function(parameters: list[Any], floats: list[Any], others: list[Any]) -> list[Any]:
            mine, first, second = iter(parameters), iter(floats), iter(others)
            full = [
                next(mine) if layout.trained else jax.lax.stop_gradient(x)
                for x, layout in zip(wholes, self.layouts, strict=True)
            ]
            results = self.run(full, [next(first) if s else next(second) for s in smooth])
            return [x for x, use in zip(results, self.smooth, strict=True) if use]

        parameters = [x for x, y in zip(wholes, self.layouts, strict=True) if y.trained]
        floats = [x for x, s in zip(given, smooth, strict=True) if s]
        others = [x for x, s in zip(given, smooth, strict=True) if not s]
        arguments = (parameters, floats, others, list(above))
        parts = backward_in_parts(function, *arguments)
        layouts, leaves = [x for x in self.layouts if x.trained], [p.leaf for p in self.trained]
        indices, step = inputs.indices, inputs.step

        if parts is None:  # all at once, then

            def back(floats: Any, others: Any, above: Any) -> Any:
                return jax.vjp(lambda p, x: function(p, x, others), parameters, floats)[1](above)

            gradients, of_floats = jax.vmap(back)(floats, others, list(above))
            resolved = engine.resolve_sketched(
                gradients, layouts, leaves, self.blocks, indices, states, step
            )
            updates = resolved.updates
        else:
            of_floats, factors = parts

            def sketch(k: jax.Array) -> jax.Array:  # [B, m]
                alone = [x[None] for x in factors.of(k)]
                return engine.sketch(sections_of_wholes(alone, leaves, indices), indices, step)[0]

            z = jax.lax.map(sketch, jnp.arange(engine.topology.local_objectives))
            resolved = engine.weigh(z, self.blocks, indices, states, step)
            weights = engine.topology.own(resolved.weights)
            if self.blocks.num_blocks == 1:
                sums = factors.combined(weights[0])
            else:
                sums = [factors.combined(weights[n[0]])[i] for i, n in enumerate(indices.labels)]
            updates = [
                reduce_pieces(x.reshape(layout.shape), layout.axis, engine.topology)
                for x, layout in zip(sums, layouts, strict=True)
            ]
        rows = self.blocks.new_rows(resolved, indices.members)
        updates = tuple(u.astype(p.value.dtype) for u, p in zip(updates, self.trained, strict=True))
        return _Cotangents(updates, rows), of_floats
