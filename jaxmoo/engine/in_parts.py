"""A function's backward step in parts, so that no two objectives' gradients exist at one time.

Every objective's gradient of a parameter is a product of what the function computed with what
arrives from above. Both are as large as activations, however many objectives there are. Here the
backward step is run for all objectives up to these factors. From them follow, one at a time, the
objectives' gradients, and their weighted sum: in one product, of factors that carry the weights.

The parts are found in the traced program. What the cotangents of the arguments need is run at once;
what only the parameters' gradients need is left, and run again and again. Which axes of the program
are the objectives' is seen from a second trace, for one objective more.
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


class Factor(NamedTuple):
    """A value that gradients are made of."""

    value: jax.Array
    axis: int | None  # of the objectives; None: it is the same for all
    linear: bool  # whether it grows with the cotangents


class Factors(NamedTuple):
    """What the gradients of parameters are made of, for K objectives; see the module."""

    jaxpr: Any  # the program
    gradients: Sequence[Any]  # the variables that are gradients
    rest: Sequence[Any]  # the operations that only these need
    alone: Sequence[Any]  # the same for a single objective
    known: dict[Any, Factor]  # by variable

    def of(self, k: jax.Array) -> list[jax.Array]:
        """Objective k's gradients of the parameters."""
        slices = {
            v: x if axis is None else jax.lax.dynamic_slice_in_dim(x, k, 1, axis)
            for v, (x, axis, _) in self.known.items()
        }
        return self._finish(self.alone, slices)

    def combined(self, weights: jax.Array) -> list[jax.Array]:
        """Sum of all objectives' gradients times their weights [K].

        Those of weight 0 have no part in it, and may be not finite.
        """
        scaled = {}
        for variable, (x, axis, linear) in self.known.items():
            if axis is not None and jnp.issubdtype(x.dtype, jnp.inexact):
                by = weights.reshape(-1, *(1,) * (x.ndim - 1 - axis))
                if linear:  # rounded once: weights are not those of half precision
                    x = jnp.where(by != 0, x.astype(weights.dtype) * by, 0).astype(x.dtype)
                else:  # by which something may be divided
                    x = jnp.where((by != 0) | jnp.isfinite(x), x, 1)
            scaled[variable] = x
        return self._finish(self.rest, scaled)

    def _finish(self, equations: Sequence[Any], known: dict[Any, Any]) -> list[jax.Array]:
        _evaluate(self.jaxpr, equations, known)
        return [_read(v, known) for v in self.gradients]


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

    def shapes(added: int) -> list[jax.ShapeDtypeStruct]:
        every = [x.shape for x in arguments]
        every[count:] = [(n + added, *rest) for n, *rest in every[count:]]
        return [jax.ShapeDtypeStruct(s, x.dtype) for s, x in zip(every, arguments, strict=True)]

    program, other = (_Program.of(pull, shapes(added)) for added in (0, 1))
    jaxpr = program.jaxpr
    if program.names() != other.names():
        return None
    needed = _needed(jaxpr, jaxpr.outvars[count:])
    rest = sorted(_needed(jaxpr, jaxpr.outvars) - needed)
    depends = _depends(jaxpr, jaxpr.invars[ends[2] :])
    alike = dict(zip(_variables(jaxpr), _variables(other.jaxpr), strict=True))
    alone = []
    try:
        read = [v for i in rest for v in _inputs(jaxpr.eqns[i])]
        read += [v for v in jaxpr.outvars[:count] if not isinstance(v, core.Literal)]
        made = {v for i in rest for v in jaxpr.eqns[i].outvars}
        boundary = [v for v in dict.fromkeys(read) if v not in made]
        axes = {v: _axis(v.aval.shape, alike[v].aval.shape, objectives) for v in boundary}
        for i in rest:
            parameters_of_one = _of_one(
                jaxpr.eqns[i].params, other.jaxpr.eqns[i].params, objectives
            )
            alone.append(jaxpr.eqns[i].replace(params=parameters_of_one))
    except _DifferentError:
        return None

    if any(v in depends and axes[v] is None for v in boundary):
        return None  # objectives have been added up already

    known = program.environment(arguments)
    _evaluate(jaxpr, [jaxpr.eqns[i] for i in sorted(needed)], known)
    factors = Factors(
        jaxpr=jaxpr,
        gradients=jaxpr.outvars[:count],
        rest=[jaxpr.eqns[i] for i in rest],
        alone=alone,
        known={v: Factor(known[v], axes[v], v in depends) for v in boundary},
    )
    return [_read(v, known) for v in jaxpr.outvars[count:]], factors


class _DifferentError(Exception):
    """Programs for K and for K + 1 objectives do not differ in K alone."""


def _axis(shape: tuple[int, ...], other: tuple[int, ...], objectives: int) -> int | None:
    """The objectives' axis of a variable, from its shapes for K and K + 1 of them."""
    found = [i for i, pair in enumerate(zip(shape, other, strict=True)) if pair[0] != pair[1]]
    if not found:
        return None
    if len(found) > 1 or (shape[found[0]], other[found[0]]) != (objectives, objectives + 1):
        raise _DifferentError
    return found[0]


def _of_one(parameters: dict[str, Any], other: dict[str, Any], objectives: int) -> dict[str, Any]:
    """An operation's parameters for a single objective, from those for K and K + 1."""

    def one(value: Any, more: Any) -> Any:
        if isinstance(value, tuple) and isinstance(more, tuple) and len(value) == len(more):
            found = [one(x, y) for x, y in zip(value, more, strict=True)]
            return type(value)(*found) if hasattr(value, "_fields") else tuple(found)
        if type(value) is int and (value, more) == (objectives, objectives + 1):
            return 1
        if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
            value, more, given = str(value), str(more), value
        else:
            given = value
        if value == more:
            return given
        raise _DifferentError

    return {name: one(value, other[name]) for name, value in parameters.items()}


def _variables(jaxpr: Any) -> list[Any]:
    """All variables in the order in which they are made."""
    made = [v for equation in jaxpr.eqns for v in equation.outvars]
    return [*jaxpr.constvars, *jaxpr.invars, *made]


def _read(variable: Any, known: dict[Any, Any]) -> Any:
    return variable.val if isinstance(variable, core.Literal) else known[variable]


def _evaluate(jaxpr: Any, equations: Sequence[Any], known: dict[Any, Any]) -> None:
    """Run some of a program's operations, and note what they make."""
    made = {v for equation in equations for v in equation.outvars}
    read = dict.fromkeys(v for equation in equations for v in _inputs(equation))
    asked = dict.fromkeys(v for equation in jaxpr.eqns for v in _inputs(equation))
    asked |= dict.fromkeys(v for v in jaxpr.outvars if not isinstance(v, core.Literal))
    inputs, outputs = [v for v in read if v not in made], [v for v in asked if v in made]
    part = jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=list(equations))
    found = core.jaxpr_as_fun(core.ClosedJaxpr(part, []))(*(known[v] for v in inputs))
    known.update(zip(outputs, found, strict=True))


def _inputs(equation: Any) -> list[Any]:
    """The variables that an operation reads."""
    return [v for v in equation.invars if not isinstance(v, core.Literal)]


def _run(jaxpr: Any, consts: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """Run a program, and those that it calls as parts of it."""
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, given, strict=True))
    for equation in jaxpr.eqns:
        inner = list(inner_jaxprs(equation))
        if equation.primitive.name in _CALLS and len(inner) == 1:
            inputs = [_read(v, known) for v in equation.invars]
            made = _run(inner[0], _consts(equation), inputs)
            known.update(zip(equation.outvars, made, strict=True))
        else:
            _evaluate(jaxpr, [equation], known)
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
