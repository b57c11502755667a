"""Find out how a loss function uses its parameters, by tracing it once.

A block can be resolved inside the backward pass only where one call sees all of its gradients:
every parameter in it is used by that call alone, once. Tied parameters, blocks that span calls
and weights shared by the steps of a loop are deferred instead: resolved after the pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoo.engine.jaxprs import inner_jaxprs
from jaxmoo.engine.layout import Layout
from jaxmoo.engine.parameter import Parameter
from jaxmoo.engine.reads import call_number, mark
from jaxmoo.errors import ConfigError

__all__ = ["Recorder", "Usage", "Use"]


class Use(NamedTuple):
    """One array, or one layer of a stack, that a call reads.

    Attributes:
      leaf: number of the array.
      layer: number of the layer, which may be traced; None where the array is no stack, or where
        the number is not known.
    """

    leaf: int
    layer: Any


@dataclasses.dataclass
class Call:
    """One call of a block that the trace met.

    Attributes:
      uses: what it reads; a traced layer is None.
      shapes: shapes of all its arrays, as it is given them.
      vocabulary: name of the operation on a vocabulary table, or None.
      times: how often a pass executes it.
    """

    uses: list[Use]
    shapes: tuple[tuple[int, ...], ...]
    vocabulary: str | None = None
    times: float = 0


class Recorder:
    """Stands in for the engine while the loss function is traced for its use of parameters.

    Args:
      layouts: where parameters lie, by number.
      pieces: into how many pieces arrays are cut.
    """

    def __init__(self, layouts: Sequence[Layout], pieces: int = 1) -> None:
        self.layouts = layouts
        self._pieces = pieces
        self._calls: list[Call] = []

    @property
    def shapes(self) -> list[tuple[tuple[int, ...], ...]]:
        """Per call, the shapes of its parameters."""
        return [call.shapes for call in self._calls]

    def reads(self, leaf: Any) -> bool:
        """Whether a leaf of a block's parameters is an array, in the engine's own form or not."""
        return isinstance(leaf, Parameter | jax.Array | np.ndarray)

    def over_examples(self, tree: Any) -> Any:
        """Examples of other devices are not looked at."""
        return tree

    def use(self, arrays: Sequence[Any], vocabulary: str | None = None) -> tuple[jax.Array, ...]:
        """Note a call and return its parameters as whole arrays.

        Raises:
          ConfigError: what a parameter holds was taken apart.
        """
        uses, given, seen = [], [], []
        for x in arrays:
            if isinstance(x, Parameter):
                layout = self.layouts[x.leaf]
                self._check(x, layout)
                uses.append(Use(x.leaf, _number(x.layer)))
                given.append(x.value)
                seen.append((layout.shape, layout.gathered_dtype))
            else:
                given.append(x)
                seen.append((x.shape, x.dtype))
        self._calls.append(Call(uses, tuple(x.shape for x in given), vocabulary))
        return mark(given, seen, len(self._calls) - 1)

    def _check(self, parameter: Parameter, layout: Layout) -> None:
        number = 0 if layout.layers is None else parameter.layer
        whole = parameter.value.shape == layout.piece_shape(self._pieces)
        if not whole or np.shape(number) or not jnp.issubdtype(jnp.result_type(number), np.integer):
            raise ConfigError(
                f"Parameter {parameter.path!r}: expected one layer of it, found layer {number} "
                f"with {parameter.value.shape} on each device."
            )

    def finish(self, jaxpr: Any, outside: Mapping[int, str]) -> Usage:
        """Count from the traced program how often each call is executed.

        Args:
          jaxpr: the program.
          outside: see :class:`Usage`.
        """
        for number, times in _executions(jaxpr).items():
            self._calls[number].times += times
        return Usage(self.layouts, [c for c in self._calls if c.times], outside)


@dataclasses.dataclass(frozen=True, eq=False)
class Usage:
    """Which parameters each call of the loss function reads.

    Attributes:
      layouts: where parameters lie, by number.
      calls: the calls.
      outside: numbers of the arrays that are read outside of blocks too, and the lines that do.
    """

    layouts: Sequence[Layout]
    calls: list[Call]
    outside: Mapping[int, str]

    def deferred(self) -> frozenset[int]:
        """Numbers of the arrays whose blocks must be resolved after the backward pass."""
        home = self._homes()
        # Which calls, or none in particular, see the gradients of each block.
        seen: dict[int, set[_Home | None]] = {}
        for leaf, layout in self._trainable():
            for layer, labels in enumerate(layout.block_labels):
                place = home.get((leaf, layer))
                for part, label in enumerate(labels):
                    if place is not None and place.sliced:
                        place = place._replace(part=part)
                    seen.setdefault(int(label), set()).add(place)
        late = {label for label, homes in seen.items() if None in homes or len(homes) > 1}
        late |= {
            int(label)
            for leaf, layout in self._trainable()
            if leaf in self.outside
            for label in layout.block_labels.flat
        }
        found: set[int] = set()
        while True:
            more = {
                leaf
                for leaf, layout in self._trainable()
                if leaf not in found and late & set(layout.block_labels.flat)
            }
            if not more:
                return frozenset(found)
            found |= more
            late |= {int(label) for leaf in more for label in self.layouts[leaf].block_labels.flat}

    def tied(self) -> frozenset[int]:
        """Tables that embed the tokens and score them."""
        kinds: dict[int, set[str]] = {}
        for call in self.calls:
            if call.vocabulary is not None:
                kinds.setdefault(call.uses[0].leaf, set()).add(call.vocabulary)
        return frozenset(leaf for leaf, names in kinds.items() if len(names) > 1)

    def largest_call(self) -> tuple[int, str]:
        """Parameters of the largest call whose gradients exist at one time, and its first path."""
        sizes = []
        for call in self.calls:
            mine = [self.layouts[use.leaf] for use in call.uses]
            mine = [layout for layout in mine if layout.trained]
            parts = mine[0].block_labels.shape[1] if call.vocabulary is not None and mine else 1
            if mine:
                sizes.append((sum(layout.size for layout in mine) // parts, mine[0].path))
        return max(sizes, default=(0, ""))

    def _trainable(self) -> list[tuple[int, Layout]]:
        return [(i, layout) for i, layout in enumerate(self.layouts) if layout.trained]

    def _homes(self) -> dict[tuple[int, int], _Home]:
        """The one place in which each (array, layer) is used; those used otherwise are left out."""
        places: dict[tuple[int, int], set[_Home]] = {}
        often: defaultdict[tuple[int, int], float] = defaultdict(float)
        for number, call in enumerate(self.calls):
            for leaf, layer in call.uses:
                layers = self.layouts[leaf].layers
                if call.vocabulary is not None:
                    # Both operations on one table work together, and see one slice at a time.
                    places.setdefault((leaf, 0), set()).add(_Home(leaf, 0, sliced=True))
                    often[leaf, 0] += 1 if (call.times == 1 and layers is None) else math.inf
                    continue
                read = [layer or 0] if layers is None or layer is not None else range(layers)
                for i in read:
                    places.setdefault((leaf, i), set()).add(_Home(number, i, sliced=False))
                    often[leaf, i] += call.times / len(read)
        tied = self.tied()
        return {
            use: next(iter(found))
            for use, found in places.items()
            if len(found) == 1 and often[use] == (2 if use[0] in tied else 1)
        }


class _Home(NamedTuple):
    """Who alone sees the gradients of one layer of an array.

    Attributes:
      number: of the call; or of the array, where it is a vocabulary's table.
      part: the layer; or the slice of the table, of which one is seen at a time.
      sliced: whether it is a table.
    """

    number: int
    part: int
    sliced: bool


def _number(layer: Any) -> int | None:
    """The layer's number where the program was traced with a certain one."""
    return int(layer) if isinstance(layer, int | np.integer) else None


def _executions(jaxpr: Any, times: float = 1) -> dict[int, float]:
    """How often each call runs, by its number."""
    counts: defaultdict[int, float] = defaultdict(float)
    for equation in jaxpr.eqns:
        call = call_number(equation)
        if call is not None:
            counts[call] += times
            continue
        inner = times
        if equation.primitive.name == "scan":
            inner = times * equation.params["length"]
        elif equation.primitive.name == "while":
            inner = math.inf
        for sub in inner_jaxprs(equation):
            for number, count in _executions(sub, inner).items():
                counts[number] += count
    return counts
