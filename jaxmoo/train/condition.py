"""Whether weights are numbers, how large they are, and whether training changes them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxmoo.blocks import path_string
from jaxmoo.errors import CheckpointError

__all__ = ["Condition", "check_finite", "examine", "largest", "unchanged"]

_LAYERS = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class Condition(NamedTuple):
    """What is known of one array, or of one layer of a stack of them."""

    largest: float  # absolute entry; infinite where one is not finite
    checksum: int  # of all bits


def examine(tree: Any, everywhere: Sharding) -> dict[str, Condition]:
    """Look at every floating point array of a tree, in one pass over each.

    Args:
      tree: parameters, or a state that holds something of each.
      everywhere: a sharding of all their devices that shards nothing. Processes call together.

    Returns:
      Conditions by path; a stack's have the numbers of its layers.
    """
    looks = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(x.dtype, jnp.floating) and x.size:
            name = path_string(path)
            stacked = x.ndim > 1 and _LAYERS.search(name) is not None
            looks[name] = _examined(everywhere, stacked)(x)
    found = {}
    # The devices look at all of them before anybody waits for one.
    for name, (sizes, sums) in jax.device_get(looks).items():
        if not sizes.ndim:
            found[name] = Condition(float(sizes), int(sums))
            continue
        layers = _LAYERS.search(name)
        assert layers is not None, "only stacks of layers are looked at one by one"
        start, stop = layers.span(1)
        for i, (size, checksum) in enumerate(zip(sizes, sums, strict=True), int(name[start:stop])):
            found[f"{name[:start]}{i}{name[stop:]}"] = Condition(float(size), int(checksum))
    return found


@functools.cache
def _examined(everywhere: Sharding, stacked: bool) -> Callable[[jax.Array], Any]:
    def look(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        axes = tuple(range(int(stacked), x.ndim))
        size = jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf)
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)
        total = bits.astype(jnp.uint32).sum(tuple(range(int(stacked), bits.ndim)), jnp.uint32)
        return size.max(axes).astype(jnp.float32), total

    return jax.jit(look, out_shardings=everywhere)


def check_finite(conditions: Mapping[str, Condition], what: str, advice: str) -> None:
    """Raise unless all numbers are finite.

    Args:
      conditions: from :func:`examine`.
      what: what holds them, for the message.
      advice: what to do, a sentence.

    Raises:
      CheckpointError: names the arrays with NaN or infinite numbers.
    """
    bad = [name for name, one in conditions.items() if not np.isfinite(one.largest)]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise CheckpointError(
            f"{what} cannot be trained from: {', '.join(bad[:3])}{more} hold NaN or infinite "
            f"numbers. {advice}"
        )


def largest(conditions: Mapping[str, Condition]) -> str:
    """Say where the largest weight is, for a message about a loss that is not finite."""
    name = max(conditions, key=lambda n: conditions[n].largest)
    return f"the largest weight is {conditions[name].largest:.3g}, in {name}"


def unchanged(before: Mapping[str, Condition], after: Mapping[str, Condition]) -> bool:
    """Whether no number differs between two states of the same arrays."""
    return all(after[name].checksum == one.checksum for name, one in before.items())
