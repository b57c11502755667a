"""The text of a compiled program (HLO), cut into computations and instructions.

Compilers print programs in the order in which they run. Everything that is read off a compiled
program is read here: which instructions there are, and how often each is executed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["CONTROL", "Instruction", "Program", "Visit"]

# Instructions that execute the computations they name as a sequence of instructions; what others
# name is part of them.
CONTROL = frozenset({"while", "conditional", "call"})

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:body|condition|calls|to_apply|branch_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SOURCE = re.compile(r'op_name="([^"]*)"')


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      name: its name.
      type: of its result, such as ``(f32[2,3]{1,0}, pred[])``.
      opcode: what it does.
      rest: operands and attributes.
    """

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of its result."""
        total = 0
        for _, bits, shape in _ARRAY.findall(self.type):  # pred, a truth value, takes a byte
            count = math.prod(int(n) for n in shape.split(",") if n)
            total += -(-count * int(bits or 8) // 8)
        return total

    @property
    def operands(self) -> list[str]:
        """Names of the instructions it reads."""
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])

    @property
    def called(self) -> list[str]:
        """Names of the computations it executes or consists of."""
        found = _CALLED.findall(self.rest)
        return [n.strip(" %") for several, single in found for n in (several or single).split(",")]

    @property
    def source(self) -> str:
        """The operation of the traced program it comes from; of several, one."""
        found = _SOURCE.search(self.rest)
        return found[1] if found else ""


class Visit(NamedTuple):
    """An instruction on the way through a program.

    Attributes:
      instruction: the instruction.
      computation: name of the computation it stands in.
      times: how often a call of the program executes it; in loops of unknown length, how often a
        round of the innermost of these does, and that is taken to begin as often as if the loops
        around it had one round.
      loops: sources of the loops around it whose number of rounds is not known, outermost first.
      source: its own, or else that of the loop, branch or call it is in.
    """

    instruction: Instruction
    computation: str
    times: int
    loops: tuple[str, ...]
    source: str


class Program:
    """A compiled program.

    Args:
      text: ``compiled.as_text()``.

    Raises:
      ValueError: the text is not as expected.

    Attributes:
      computations: the instructions of each computation by name, in the order they run in.
      entry: name of the computation that is the program.
      devices: number of devices that run it together.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        mine: dict[str, Instruction] = {}
        header, *lines = text.splitlines()
        self._counted = _TRIPS.search(text) is not None
        counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
        self.devices = math.prod(map(int, counts))
        for line in lines:
            if start := _COMPUTATION.match(line):
                mine = self.computations[start[2]] = {}
                if start[1]:
                    self.entry = start[2]
            elif found := _INSTRUCTION.match(line):
                mine[found[1]] = Instruction(*found.groups())
        if not hasattr(self, "entry"):
            raise ValueError(f"expected the text of a compiled program, found {header[:60]!r}...")

    def walk(self, into: frozenset[str] | None = CONTROL) -> Iterator[Visit]:
        """Visit every instruction that the program executes, in the order of the text.

        Of a conditional, all branches are visited.

        Args:
          into: opcodes whose computations are visited, after the instruction; None for all.
        """
        yield from self._walk(self.entry, 1, (), "", into)

    def _walk(
        self,
        computation: str,
        times: int,
        loops: tuple[str, ...],
        source: str,
        into: frozenset[str] | None,
    ) -> Iterator[Visit]:
        for one in self.computations[computation].values():
            mine = one.source or source
            yield Visit(one, computation, times, loops, mine)
            # The last two repeat the names that the start has.
            if one.opcode in ("async-update", "async-done") or (into and one.opcode not in into):
                continue
            names, inner, around = one.called, times, loops
            if one.opcode == "while":
                rounds = self.rounds(one)
                if rounds is None:
                    around = (*loops, mine or one.name)
                else:
                    inner = times * rounds
                    # Counters of a known number of rounds are compared by nobody.
                    names = re.findall(r"\bbody=%?([\w.\-]+)", one.rest)
            for name in names:
                yield from self._walk(name, inner, around, mine, into)

    def rounds(self, loop: Instruction) -> int | None:
        """How many rounds a loop has; None where that depends on the data.

        Compilers for CPUs and GPUs write it down. Of a TPU's program it is read off the condition:
        loops that JAX makes of a known length count from 0 up to a constant, and do nothing else
        there.
        """
        if found := _TRIPS.search(loop.rest):
            return int(found[1])
        if self._counted:
            return None
        found = re.search(r"\bcondition=%?([\w.\-]+)", loop.rest)
        condition = self.computations.get(found[1], {}) if found else {}
        return _bound(list(condition.values()))


_TRIVIAL = {"parameter", "constant", "get-tuple-element", "bitcast", "copy"}


def _bound(condition: list[Instruction]) -> int | None:
    """The constant that a counter is compared with, if a loop's condition is that and no more."""
    numbers = {
        one.name: int(found[1])
        for one in condition
        if one.opcode == "constant"
        and one.type.startswith("s32[]")
        and (found := re.match(r"(-?\d+)\)", one.rest))
    }
    work = [one for one in condition if one.opcode not in _TRIVIAL]
    if len(work) != 1 or work[0].opcode != "compare" or "direction=LT" not in work[0].rest:
        return None
    return numbers.get(work[0].operands[-1])
