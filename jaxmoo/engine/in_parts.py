"""A function's backward step in parts, so that no two objectives' gradients exist at one time.

Every objective's gradient of a parameter is a product of what the function computed with what
arrives from above. Both are as large as activations, however many objectives there are. Here the
backward step is run for all objectives up to these factors. From them follow, one at a time, the
objectives' gradients, and their weighted sum: in one product, of factors that carry the weights.

The parts are found in the traced program. What the cotangents of the arguments need is run at once;
what only the parameters' gradients need is left, and run again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxmoo.engine.jaxprs import inner_jaxprs

__all__ = ["Factors", "backward_in_parts"]

# Calls of programs whose operations may be run as if they were the caller's own.
_CALLS = {"jit", "pjit", "closed_call", "checkpoint", "remat", "remat2", "custom_jvp_call"}


class _Program(NamedTuple):
    """The backward step for some number of objectives, traced: without calls of other programs."""

    jaxpr: Any
    consts: Sequence[Any]

    @classmethod
    def of(cls, function: Callable[..., Any], arguments: Sequence[Any]) -> _Program:
        """Trace a function of arrays that returns arrays."""
        traced = jax.make_jaxpr(function)(*arguments)
        flat = jax.make_jaxpr(lambda *given: _run(traced.jaxpr, traced.consts, given))(*arguments)
        return cls(flat.jaxpr, flat.consts)

    def names(self) -> list[str]:
        """Names of the operations, by which two programs are told apart."""
        return [equation.primitive.name for equation in self.jaxpr.eqns]

    def environment(self, given: Sequence[Any]) -> dict[Any, Any]:
        """Values of the variables that are there at the beginning."""
        known = dict(zip(self.jaxpr.constvars, self.consts, strict=True))
        return known | dict(zip(self.jaxpr.invars, given, strict=True))


class Factors(NamedTuple):
    """What the gradients of parameters are made of, for K objectives; see the module."""

    whole: _Program  # for K objectives
    one: _Program  # for a single one
    count: int  # outputs that are gradients, the first of all
    rest: Sequence[int]  # numbers of the operations that only these need
    values: Sequence[tuple[int, Any]]  # variables' numbers among all, and values
    axes: Sequence[int | None]  # of the objectives in each value
    linear: Sequence[bool]  # whether a value grows with the cotangents

    def of(self, k: jax.Array) -> list[jax.Array]:
        """Objective k's gradients of the parameters."""
        slices = [
            x if axis is None else jax.lax.dynamic_slice_in_dim(x, k, 1, axis)
            for (_, x), axis in zip(self.values, self.axes, strict=True)
        ]
        return self._finish(self.one, slices)

    def combined(self, weights: jax.Array) -> list[jax.Array]:
        """Sum of all objectives' gradients times their weights [K].

        Those of weight 0 have no part in it, and may be not finite.
        """
        scaled = []
        for (_, x), axis, linear in zip(self.values, self.axes, self.linear, strict=True):
            if axis is not None and jnp.issubdtype(x.dtype, jnp.inexact):
                by = weights.reshape(-1, *(1,) * (x.ndim - 1 - axis))
                x = jnp.where(by != 0, (x * by.astype(x.dtype)) if linear else x, 0)
            scaled.append(x)
        return self._finish(self.whole, scaled)

    def _finish(self, program: _Program, values: Sequence[Any]) -> list[jax.Array]:
        variables = _variables(program.jaxpr)
        known = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
        known |= {variables[n]: x for (n, _), x in zip(self.values, values, strict=True)}
        _evaluate(program.jaxpr, self.rest, known)
        return [_read(v, known) for v in program.jaxpr.outvars[: self.count]]


def backward_in_parts(
    function: Callable[[list[Any], list[Any], list[Any]], list[Any]],
    parameters: Sequence[jax.Array],
    given: Sequence[jax.Array],
    fixed: Sequence[jax.Array],
    cotangents: Sequence[jax.Array],
) -> tuple[list[jax.Array], Factors] | None:
    """Run the backward step of a function of one objective for K of them.

    Args:
      function: ``(parameters, given, fixed) -> results``, lists of arrays with derivatives.
      parameters: the same for all objectives.
      given: arguments of every objective [K, ...]; K > 1.
      fixed: likewise, without derivatives.
      cotangents: of the results [K, ...].

    Returns:
      ``(cotangents of given [K, ...], factors)``; or None where the function does something to the
      parameters that cannot be taken apart.
    """
    count, objectives = len(parameters), len(cotangents[0])
    ends = np.cumsum([count, len(given), len(fixed)])

    def pull(*arguments: Any) -> list[Any]:
        mine, theirs = list(arguments[: ends[0]]), list(arguments[ends[0] : ends[1]])
        others, above = list(arguments[ends[1] : ends[2]]), list(arguments[ends[2] :])

        def results(parameters: Any, given: Any) -> Any:
            return jax.vmap(function, (None, 0, 0))(parameters, given, others)

        of_parameters, of_given = jax.vjp(results, mine, theirs)[1](above)
        return [*of_parameters, *of_given]

    arguments = [*parameters, *given, *fixed, *cotangents]
    shapes = [x.shape if i < count else (1, *x.shape[1:]) for i, x in enumerate(arguments)]
    alone = [jax.ShapeDtypeStruct(s, x.dtype) for s, x in zip(shapes, arguments, strict=True)]
    whole, one = _Program.of(pull, arguments), _Program.of(pull, alone)
    if whole.names() != one.names():
        return None

    needed = _needed(whole.jaxpr, whole.jaxpr.outvars[count:])
    every = _needed(whole.jaxpr, whole.jaxpr.outvars)
    rest = sorted(every - needed)
    known = whole.environment(arguments)
    _evaluate(whole.jaxpr, sorted(needed), known)

    made = {v for i in rest for v in whole.jaxpr.eqns[i].outvars}
    wanted = [v for i in rest for v in _inputs(whole.jaxpr.eqns[i])]
    wanted += whole.jaxpr.outvars[:count]
    boundary = dict.fromkeys(
        v for v in wanted if not isinstance(v, core.Literal) and v not in made and v in known
    )
    numbers = {v: n for n, v in enumerate(_variables(whole.jaxpr))}
    boundary = {v: None for v in boundary if v in numbers}
    alike = _variables(one.jaxpr)
    depends = _depends(whole.jaxpr, whole.jaxpr.invars[ends[2] :])
    axes: list[int | None] = []
    for v in boundary:
        before, after = v.aval.shape, alike[numbers[v]].aval.shape
        differs = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        if len(differs) > 1 or any((before[i], after[i]) != (objectives, 1) for i in differs):
            return None
        if not differs and v in depends:  # objectives have been added up already
            return None
        axes.append(differs[0] if differs else None)
    factors = Factors(
        whole=whole,
        one=one,
        count=count,
        rest=rest,
        values=[(numbers[v], known[v]) for v in boundary],
        axes=axes,
        linear=[v in depends for v in boundary],
    )
    return [_read(v, known) for v in whole.jaxpr.outvars[count:]], factors


def _variables(jaxpr: Any) -> list[Any]:
    """All variables in the order in which they are made."""
    made = [v for equation in jaxpr.eqns for v in equation.outvars]
    return [*jaxpr.invars, *made]


def _read(variable: Any, known: dict[Any, Any]) -> Any:
    return variable.val if isinstance(variable, core.Literal) else known[variable]


def _evaluate(jaxpr: Any, numbers: Sequence[int], known: dict[Any, Any]) -> None:
    """Run some of a program's operations, and note what they make."""
    equations = [jaxpr.eqns[number] for number in numbers]
    made = {v for equation in equations for v in equation.outvars}
    read = dict.fromkeys(v for equation in equations for v in _inputs(equation))
    asked = dict.fromkeys(v for equation in jaxpr.eqns for v in _inputs(equation))
    asked |= dict.fromkeys(v for v in jaxpr.outvars if not isinstance(v, core.Literal))
    inputs, outputs = [v for v in read if v not in made], [v for v in asked if v in made]
    part = jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=equations)
    found = core.jaxpr_as_fun(core.ClosedJaxpr(part, []))(*(known[v] for v in inputs))
    known.update(zip(outputs, found, strict=True))


def _inputs(equation: Any) -> list[Any]:
    """The variables that an operation reads."""
    return [v for v in equation.invars if not isinstance(v, core.Literal)]


def _run(jaxpr: Any, consts: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """Run a program, and those that it calls as parts of it."""
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, given, strict=True))
    for number, equation in enumerate(jaxpr.eqns):
        inner = list(inner_jaxprs(equation))
        if equation.primitive.name in _CALLS and len(inner) == 1:
            inputs = [_read(v, known) for v in equation.invars]
            made = _run(inner[0], _consts(equation), inputs)
            known.update(zip(equation.outvars, made, strict=True))
        else:
            _evaluate(jaxpr, [number], known)
    return [_read(v, known) for v in jaxpr.outvars]


def _consts(equation: Any) -> Sequence[Any]:
    """Constants of the program that an operation calls."""
    closed = [x for x in equation.params.values() if hasattr(x, "consts")]
    return closed[0].consts if closed else []


def _needed(jaxpr: Any, variables: Sequence[Any]) -> set[int]:
    """Numbers of the operations that some variables follow from."""
    wanted = {v for v in variables if not isinstance(v, core.Literal)}
    found = set()
    for number in reversed(range(len(jaxpr.eqns))):
        equation = jaxpr.eqns[number]
        if wanted.intersection(equation.outvars):
            found.add(number)
            wanted.update(_inputs(equation))
    return found


def _depends(jaxpr: Any, variables: Sequence[Any]) -> set[Any]:
    """The variables that follow from some."""
    found = set(variables)
    for equation in jaxpr.eqns:
        if found.intersection(_inputs(equation)):
            found.update(equation.outvars)
    return found
