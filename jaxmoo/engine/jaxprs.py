"""Walking through traced programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from jax.extend import core

__all__ = ["inner_jaxprs"]


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """Yield the programs inside of an equation: bodies of loops, branches, called functions."""
    return _within(equation.params.values())


def _within(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _within(value)
