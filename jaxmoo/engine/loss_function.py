"""A loss function of somebody's own, and the parameters that it is given.

In the engine a parameter is one device's piece of it, in a form of its own that only blocks can
read. What is read elsewhere too is given as an ordinary array, gathered whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmoo.engine.block import current, running
from jaxmoo.engine.layout import Layout
from jaxmoo.engine.parameter import Parameter
from jaxmoo.engine.reads import Reads, reads_of
from jaxmoo.engine.usage import Recorder, Usage
from jaxmoo.errors import ConfigError, JaxmooError

__all__ = ["LossFunction"]


@dataclasses.dataclass(frozen=True, eq=False)
class LossFunction:
    """A loss function of one objective.

    Attributes:
      function: ``(params, batch)`` or ``(params, frozen, batch) -> scalar``, or ``(scalar, aux)``.
      layouts: where every array lies, the trainable ones first.
      num_trained: number of trainable arrays.
      has_frozen: whether the function takes frozen parameters.
      has_aux: whether it returns more than the loss.
    """

    function: Callable[..., Any]
    layouts: tuple[Layout, ...]
    num_trained: int
    has_frozen: bool
    has_aux: bool

    def __call__(
        self,
        values: Sequence[Any],
        accumulators: Mapping[int, Any],
        batch: Any,
        *,
        trees: Any,
        outside: frozenset[int],
    ) -> tuple[jax.Array, Any]:
        """Call the function with this device's pieces of the parameters.

        Args:
          values: the pieces.
          accumulators: the cotangent accumulators of deferred arrays, by number.
          batch: one objective's.
          trees: the structures of both trees of parameters.
          outside: numbers of the parameters that are read outside of blocks.

        Returns:
          ``(loss, aux)``; aux is None where there is none.
        """
        given = self._given(values, outside, accumulators)
        for number in outside:
            parameter = self._parameter(number, values[number], accumulators.get(number))
            given[number] = current().whole(parameter)
        return self._call(given, batch, trees)

    def usage(self, trees: Any, batch: Any, pieces: int) -> Usage:
        """Trace the function on shapes, to see how it uses the parameters.

        Args:
          trees: the structures of both trees of parameters.
          batch: shapes of one objective's batch on one device.
          pieces: into how many pieces arrays are cut.

        Raises:
          ConfigError: a trainable parameter is not read by any block.
        """
        everything = frozenset(range(len(self.layouts)))
        try:
            seen = self._trace(trees, batch, pieces, everything)
        except JaxmooError:
            raise
        except Exception:
            # A parameter where a block is missing may not fit there either: that is said first.
            self._trace(trees, batch, pieces, frozenset())
            raise
        outside = seen.reads.outside
        try:
            found = self._trace(trees, batch, pieces, frozenset(outside))
        except Exception:
            # With ordinary arrays it can be traced: it is no error of the loss function's.
            found = None
        if found is None or found.reads != seen.reads:
            # It asks for more than parameters in the engine's own form can answer.
            outside, found = dict.fromkeys(everything, "") | outside, seen
        trained = self.layouts[: self.num_trained]
        unused = [x.path for i, x in enumerate(trained) if i not in seen.reads.reached]
        if unused:
            raise ConfigError(
                f"No block reads the trainable parameters {', '.join(unused[:5])}"
                f"{', ...' if len(unused) > 5 else ''}: they cannot learn. Freeze them."
            )
        return found.recorder.finish(found.jaxpr, outside)

    def _trace(self, trees: Any, batch: Any, pieces: int, outside: frozenset[int]) -> _Traced:
        """Trace the function with parameters of which some are given as ordinary arrays."""
        recorder = Recorder(self.layouts, pieces)

        def loss(values: list[Any], batch: Any) -> tuple[jax.Array, Any]:
            with running(recorder):
                return self._call(self._given(values, outside), batch, trees)

        cuts = [1 if i in outside else pieces for i in range(len(self.layouts))]
        values = [
            jax.ShapeDtypeStruct(layout.stack_shape(n), layout.gathered_dtype)
            for layout, n in zip(self.layouts, cuts, strict=True)
        ]
        jaxpr = jax.make_jaxpr(loss)(values, batch).jaxpr
        shapes = [layout.piece_shape(n) for layout, n in zip(self.layouts, cuts, strict=True)]
        leaves = [*range(len(values)), *[None] * (len(jaxpr.invars) - len(values))]
        reads = reads_of(jaxpr, self.layouts, recorder.shapes, leaves, shapes)
        return _Traced(recorder, jaxpr, reads)

    def _given(
        self,
        values: Sequence[Any],
        outside: frozenset[int],
        accumulators: Mapping[int, Any] = MappingProxyType({}),
    ) -> list[Any]:
        """What the loss function gets for each array: it itself, or what only blocks can read."""
        return [
            value if i in outside else self._parameter(i, value, accumulators.get(i))
            for i, value in enumerate(values)
        ]

    def _call(self, given: Sequence[Any], batch: Any, trees: Any) -> tuple[jax.Array, Any]:
        arguments = [jax.tree.unflatten(trees[0], given[: self.num_trained])]
        if self.has_frozen:
            arguments.append(jax.tree.unflatten(trees[1], given[self.num_trained :]))
        result = self.function(*arguments, batch)
        return result if self.has_aux else (result, None)

    def _parameter(self, number: int, value: Any, accumulator: Any) -> Parameter:
        layout = self.layouts[number]
        layer = None if layout.layers is None else np.arange(layout.layers, dtype=np.int32)
        return Parameter(value, accumulator, layer, number, layout.path, layout.shape)


class _Traced(NamedTuple):
    """A traced loss function: who recorded its calls, the program, and its reads."""

    recorder: Recorder
    jaxpr: Any
    reads: Reads
