"""Where a loss function reads its parameters: in blocks, or outside of them.

The loss function is traced with ordinary arrays, and the traced program is followed from the
parameters on. As long as an array is handed on, or a layer is taken from its stack, nothing has
been read; a block reads it where it ends in a block's mark. Any other operation reads it outside
of a block, whatever it is and however the loss function got at the array.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from jaxmoo.engine.jaxprs import inner_jaxprs, source_line
from jaxmoo.engine.layout import Layout
from jaxmoo.errors import ConfigError

__all__ = ["Reads", "call_number", "mark", "reads_of"]

# Begins the name under which a block's parameters are seen in a traced program.
MARK = "jaxmoo_block_"

# Operations that run the programs inside of them on the values they are given, one by one.
_TRANSPARENT = {"jit", "pjit", "checkpoint", "remat", "remat2", "scan", "cond"}
# Those that may take layers from a stack.
_TAKING = {"slice", "dynamic_slice", "squeeze", "reshape"}


def mark(values: Sequence[Any], shapes: Sequence[tuple[Any, Any]], number: int) -> tuple[Any, ...]:
    """Mark a block's parameters in a program that is traced and never run.

    Args:
      values: what the block is given.
      shapes: shape and dtype of what it sees.
      number: the call's number.
    """

    def marked(values: tuple[Any, ...]) -> tuple[Any, ...]:
        del values
        return tuple(jax.numpy.zeros(shape, dtype) for shape, dtype in shapes)

    marked.__name__ = f"{MARK}{number}_"
    return jax.jit(marked)(tuple(values))


class Operation(NamedTuple):
    """One operation of a program, as far as it tells two programs apart.

    Attributes:
      name: its primitive's, or that of a block's mark.
      uses: of a block, the numbers of the arrays that it reads a layer of.
      literals: constants among its inputs.
      outputs: shapes and dtypes.
    """

    name: str
    uses: tuple[int, ...] = ()
    literals: tuple[str, ...] = ()
    outputs: tuple[tuple[tuple[int, ...], Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Reads:
    """What was found.

    Attributes:
      outside: numbers of the arrays that are read outside of a block, and the line that does so.
      reached: numbers of the arrays that blocks read, or what was made of them.
      program: what the program computes, apart from handing parameters on; see :func:`reads_of`.
    """

    outside: dict[int, str]
    reached: frozenset[int]
    program: list[Operation]


class _Origin(NamedTuple):
    """What a variable of the program is.

    Attributes:
      leaf: number of the parameter it is, or whose layers it is; else None.
      made_of: numbers of the parameters it was computed from outside of blocks.
    """

    leaf: int | None = None
    made_of: frozenset[int] = frozenset()


def reads_of(
    jaxpr: Any,
    layouts: Sequence[Layout],
    calls: Sequence[tuple[tuple[int, ...], ...]],
    leaves: Sequence[int | None],
    shapes: Sequence[tuple[int, ...]],
) -> Reads:
    """Follow the parameters through a traced loss function.

    Args:
      jaxpr: the program.
      layouts: where parameters lie, by number.
      calls: per call of a block, the shapes of its parameters as it saw them.
      leaves: which parameter each input of the program is, or None.
      shapes: per parameter, the shape of it or of one of its layers in the program.

    Returns:
      The reads. Two programs of equal ``program`` compute the same, however parameters are handed
      on in them.

    Raises:
      ConfigError: a block was mapped over its parameters, or a parameter is read outside of a
        block and its values reach none.
    """
    follow = _Follow(layouts, calls, shapes)
    follow.run(jaxpr, [_Origin(leaf) for leaf in leaves])
    lost = [leaf for leaf in follow.outside if leaf not in follow.reached]
    if lost:
        raise ConfigError(
            f"Parameter {layouts[lost[0]].path!r} is used outside of a block"
            f"{follow.outside[lost[0]]}, and reaches none. Every call that reads parameters must "
            "be one: write jaxmoo.block(function)(params, ...) where the loss has "
            "function(params, ...)."
        )
    return Reads(follow.outside, frozenset(follow.reached), follow.program)


class _Follow:
    def __init__(
        self,
        layouts: Sequence[Layout],
        calls: Sequence[tuple[tuple[int, ...], ...]],
        one_layer: Sequence[tuple[int, ...]],
    ) -> None:
        self.layouts, self.calls, self.one_layer = layouts, calls, one_layer
        self.outside: dict[int, str] = {}
        self.reached: set[int] = set()
        self.program: list[Operation] = []

    def run(self, jaxpr: Any, given: Sequence[_Origin]) -> list[_Origin]:
        """Follow a program's inputs to its outputs."""
        known = dict(zip(jaxpr.invars, given, strict=True))

        def origin(variable: Any) -> _Origin:
            return _Origin() if isinstance(variable, core.Literal) else known.get(variable, _NONE)

        for equation in jaxpr.eqns:
            inputs = [origin(v) for v in equation.invars]
            known.update(zip(equation.outvars, self.step(equation, inputs), strict=True))
        return [origin(v) for v in jaxpr.outvars]

    def step(self, equation: Any, inputs: Sequence[_Origin]) -> list[_Origin]:
        """Follow one operation's inputs to its outputs."""
        name = equation.primitive.name
        call = call_number(equation)
        if call is not None:
            self._block(equation, inputs, call)
            return [_NONE] * len(equation.outvars)
        if name in _TRANSPARENT:
            return self._inside(equation, inputs)
        if inputs and self._takes(equation, inputs):
            return [inputs[0]]
        self._read(equation, inputs)
        made_of = _all_of(inputs)
        self._note(equation, inputs)
        for sub in inner_jaxprs(equation):
            self.run(sub, [_Origin(made_of=made_of)] * len(sub.invars))
        return [_Origin(made_of=made_of)] * len(equation.outvars)

    def _block(self, equation: Any, inputs: Sequence[_Origin], call: int) -> None:
        uses = []
        for variable, x, seen in zip(equation.invars, inputs, self.calls[call], strict=True):
            self.reached |= x.made_of
            if x.leaf is None:
                continue
            self.reached.add(x.leaf)
            if variable.aval.shape != seen:
                raise ConfigError(
                    f"The block that reads {self.layouts[x.leaf].path!r} was called inside a vmap "
                    "over its parameters. Loop or scan over them instead."
                )
            if seen == self.one_layer[x.leaf]:
                uses.append(x.leaf)
            else:  # several layers at once: no layer's block can be resolved there
                self._read(equation, [x])
        self.program.append(Operation(MARK, uses=tuple(uses)))

    def _inside(self, equation: Any, inputs: Sequence[_Origin]) -> list[_Origin]:
        loop, found = equation.primitive.name == "scan", []
        for sub in inner_jaxprs(equation):
            # A conditional keeps its first input, the choice, to itself.
            outer = equation.invars[-len(sub.invars) :] if sub.invars else []
            given = list(inputs[-len(sub.invars) :] if sub.invars else [])
            for at, (v, inner) in enumerate(zip(outer, sub.invars, strict=True)):
                x = given[at]
                if x.leaf is None:
                    continue
                before, after = v.aval.shape, inner.aval.shape
                handed = before == after or (loop and before[1:] == after)
                if not (handed and self._layers(x.leaf, after)):
                    self._read(equation, [x])
                    given[at] = _Origin(made_of=_all_of([x]))
            found.append(self.run(sub, given))
        if len(found) == 1 and not loop:
            return found[0]
        for outputs in found:
            self._read(equation, outputs)
        return [_Origin(made_of=_all_of([x for o in found for x in o]))] * len(equation.outvars)

    def _layers(self, leaf: int, shape: tuple[int, ...]) -> bool:
        """Whether this is the shape of one layer of a parameter, or of a stack of some."""
        one = self.one_layer[leaf]
        lead = len(shape) - len(one)
        return shape[lead:] == one and (lead == 0 or (lead > 0 and self._stacked(leaf)))

    def _stacked(self, leaf: int) -> bool:
        return self.layouts[leaf].layers is not None

    def _takes(self, equation: Any, inputs: Sequence[_Origin]) -> bool:
        """Whether an operation only takes layers from a stack, or arranges them."""
        first, rest = inputs[0], inputs[1:]
        if first.leaf is None or equation.primitive.name not in _TAKING:
            return False
        if any(x != _NONE for x in rest) or not self._stacked(first.leaf):
            return False
        before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        cuts = equation.primitive.name in ("slice", "dynamic_slice")
        if not self._layers(first.leaf, after):
            return False
        # A cut along another axis than the stack's would change that axis.
        return len(before) == len(after) if cuts else np.prod(before) == np.prod(after)

    def _read(self, equation: Any, inputs: Sequence[_Origin]) -> None:
        for x in inputs:
            if x.leaf is not None:
                self.outside.setdefault(x.leaf, source_line(equation))

    def _note(self, equation: Any, inputs: Sequence[_Origin]) -> None:
        kinds = [(v.aval.shape, v.aval.dtype) for v in equation.outvars if hasattr(v.aval, "dtype")]
        if all(shape == () and not jax.numpy.issubdtype(d, np.inexact) for shape, d in kinds):
            return  # numbers of layers
        literals = [str(v.val) for v in equation.invars if isinstance(v, core.Literal)]
        self.program.append(
            Operation(equation.primitive.name, literals=tuple(literals), outputs=tuple(kinds))
        )


_NONE = _Origin()


def _all_of(inputs: Sequence[_Origin]) -> frozenset[int]:
    """All parameters that some values were made of."""
    leaves = {x.leaf for x in inputs if x.leaf is not None}
    return frozenset(leaves).union(*(x.made_of for x in inputs))


def call_number(equation: Any) -> int | None:
    """Number of the call whose mark an operation is, or None."""
    name = str(equation.params.get("name", ""))
    return int(name[len(MARK) :].rstrip("_")) if name.startswith(MARK) else None
