"""``jaxmoo methods``: list the aggregators, the kinds of blocks and the loss weightings."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jaxmoo.commands.command import command

if TYPE_CHECKING:
    from jaxmoo.aggregators import Aggregator

__all__ = ["main"]

_OBJECTIVES = 2  # any number would do: to see whether a method keeps a state


@command()
def main(arguments: Sequence[str] | None = None, prog: str = "jaxmoo methods") -> int:
    """Run the command; return its exit code: see `command`."""
    argparse.ArgumentParser(
        prog=prog,
        description="List the methods that resolve conflicts, with their options and defaults, the "
        "kinds of blocks and the loss weightings.",
    ).parse_args(arguments)
    print("\n".join(_lines()))
    return 0


def _lines() -> Iterator[str]:
    from jaxmoo import aggregators, blocks, weighting

    yield "Methods that resolve conflicts (resolve.aggregator; options in resolve.options)"
    for name in aggregators.names():
        factory = getattr(aggregators, name)
        yield from _entry(name, factory, _traits(factory(**_required(factory))))
    yield "\nKinds of blocks (resolve.blocks)"
    for name in blocks.names():
        kind = name.partition(":")[0]
        yield f"\n  {name}\n    {_first_line(getattr(blocks, _BLOCKS.get(kind, kind)))}"
    yield "\nLoss weightings (jaxmoo.weighting, in Python)"
    for name in weighting.names():
        factory = getattr(weighting, name)
        yield from _entry(name, factory, [])


_BLOCKS = {"bytes": "of_bytes"}  # whose function has another name


def _entry(name: str, factory: Callable[..., Any], traits: Sequence[str]) -> Iterator[str]:
    yield f"\n  {name}\n    {_first_line(factory)}"
    if traits:
        yield f"    kind: {', '.join(traits)}"
    options = inspect.signature(factory).parameters.values()
    if options:
        yield "    options: " + ", ".join(
            f"{one.name} (needed)" if one.default is one.empty else f"{one.name}={one.default!r}"
            for one in options
        )


def _traits(method: Aggregator) -> list[str]:
    """What a method reads, keeps and draws."""
    import jax

    if method.combine is not None:
        reads = "coordinates of the gradients"
    elif method.reads_gram:
        reads = "Gram matrix"
    else:
        reads = "fixed or random weights"
    traits = {
        "two batches per step": method.cross_gram,
        "stateful": bool(jax.tree.leaves(jax.eval_shape(lambda: method.init(_OBJECTIVES)))),
        "stochastic": method.stochastic,
    }
    return [reads, *(trait for trait, has in traits.items() if has)]


def _required(factory: Callable[..., Any]) -> dict[str, Any]:
    """Any numbers for the options without a default; all of these take one per objective."""
    return {
        one.name: [1.0] * _OBJECTIVES
        for one in inspect.signature(factory).parameters.values()
        if one.default is one.empty
    }


def _first_line(thing: Callable[..., Any]) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0].replace("``", "`")
