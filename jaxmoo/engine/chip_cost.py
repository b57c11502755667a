"""What a step costs on a chip, read off the program that the chip's own compiler made of it.

- Kernels that a GPU is told to start, each of which takes a few microseconds whatever it does.
- Cycles that a TPU's compiler expects every operation to take. It has no estimate of communication
  and of kernels written by hand, such as attention's.
- Bytes that devices send to each other, and whether a product runs meanwhile.

None of these is a time. They say where it goes and what changed; how long a step takes only the
chip can tell.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxmoo.engine.cost import BETWEEN, is_between, kind_of, sent_by, sent_bytes
from jaxmoo.engine.hlo import CONTROL, Instruction, Program

__all__ = ["PARTS", "Cost", "Sent", "cycles", "launches", "part_of", "sent"]

# Parts of a step, and how the names of operations tell of them. The first that fits counts; the
# scopes are those of `jaxmoo.resolve`, the engine and the training step.
PARTS = {
    "conflicts: Gram matrices": r"/gram/",
    "conflicts: solve": r"/solve/",
    "conflicts: combination": r"/combine/",
    "exchange of gradients": r"/exchange/",
    "conflicts: the rest": r"/jit\(_resolve_call\)/",
    "vocabulary's gradients": r"jit\(resolve\)",
    "gathering of parameters": r"/gather_pieces/",
    "recomputed forward pass": r"rematted_computation",
    "backward pass": r"transpose\(",
    "forward pass": r"jvp\(",
    "optimiser": r"/optimizer/",
}
REST = "everything else"

_PARTS = {name: re.compile(pattern) for name, pattern in PARTS.items()}


def part_of(source: str) -> str:
    """Name the part of a step that an operation belongs to.

    Args:
      source: the operation's name in the traced program.

    Example:
      >>> part_of("jit(step)/vmap(transpose(jvp()))/while/body/jit(_resolve_call)/gram/mul")
      'conflicts: Gram matrices'
      >>> part_of("jit(step)/shard_map/vmap(jvp())/while/body/dot_general")
      'forward pass'
    """
    return next((name for name, found in _PARTS.items() if found.search(source)), REST)


class Cost(NamedTuple):
    """A quantity summed over a program.

    Attributes:
      parts: by part of the step, outside of loops whose number of rounds depends on the data.
      per_round: in these loops, by their source: what it would be if each had one round.
    """

    parts: dict[str, int]
    per_round: dict[str, int]

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())

    @property
    def conflicts(self) -> int:
        """What conflicts add by name; what they change elsewhere only a comparison shows."""
        return sum(n for name, n in self.parts.items() if name.startswith("conflicts"))


def launches(program: Program) -> Cost:
    """Count the kernels and copies that a GPU is told to start in one call of a program.

    What a graph of several kernels starts at once is counted kernel by kernel.
    """
    return _sum(program, CONTROL, lambda one: int(_starts(one.opcode)))


def cycles(program: Program) -> Cost:
    """Add up the cycles that a TPU's compiler expects, in one call of a program."""

    def expected(one: Instruction) -> int:
        found = re.search(r'"estimated_cycles":"(\d+)"', one.rest)
        count = int(found[1]) if found else 0
        return count if count < _NONSENSE else 0

    return _sum(program, CONTROL | {"async-start"}, expected)


_NONSENSE = 10**12  # what the compiler writes where it does not know

_NO_KERNELS = CONTROL | {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency", "async-update"),
}


def _starts(opcode: str) -> bool:
    return opcode not in _NO_KERNELS and not opcode.endswith("-done")


def _sum(program: Program, into: frozenset[str], count: Callable[[Instruction], int]) -> Cost:
    parts: Counter[str] = Counter()
    per_round: Counter[str] = Counter()
    for visit in program.walk(into):
        number = visit.times * count(visit.instruction)
        if number and visit.loops:
            per_round[visit.loops[-1]] += number
        elif number:
            parts[part_of(visit.source)] += number
    order = {name: parts[name] for name in (*PARTS, REST) if name in parts}
    return Cost(order, dict(per_round))


class Sent(NamedTuple):
    """What each device sends by one kind of communication.

    Attributes:
      bytes: in one call of the program, loops of unknown length counted once.
      exposed: of these, what no matrix product of some size runs beside: what begins and ends at
        once, or has none between its begin and its end in the order of the program. A product
        beside it is necessary for its being hidden, and not sufficient.
    """

    bytes: int
    exposed: int


def sent(program: Program, slices: int = 1, devices: int | None = None) -> dict[str, Sent]:
    """Count what a program sends by kind; see :func:`jaxmoo.engine.cost.collective_bytes`.

    Args:
      program: the program; where TPUs are in several slices, that of one slice.
      slices: among how many slices the devices are divided.
      devices: how many there are in all; by default those of the program.
    """
    in_slice = (program.devices if devices is None else devices) // slices
    total: Counter[str] = Counter()
    exposed: Counter[str] = Counter()
    times: Counter[str] = Counter()  # that each computation is executed
    for visit in program.walk():
        if visit.instruction is next(iter(program.computations[visit.computation].values())):
            times[visit.computation] += visit.times
    for computation, often in times.items():
        for kind, count, hidden in _communications(program, computation, slices, in_slice):
            total[kind] += often * count
            exposed[kind] += 0 if hidden else often * count
    return {kind: Sent(count, exposed[kind]) for kind, count in total.items()}


def _communications(
    program: Program, computation: str, slices: int, in_slice: int
) -> Iterator[tuple[str, int, bool]]:
    """Kind and bytes of each communication of a computation, and whether a product is beside it."""
    instructions = list(program.computations[computation].values())
    products = [_is_product(program, one) for one in instructions]
    begun: dict[str, tuple[int, str, int]] = {}
    names: dict[str, str] = {}  # of a message between slices, by what receives it
    for at, one in enumerate(instructions):
        message = _message(one)
        ended = names.get(one.operands[0]) if one.opcode == "recv-done" else None
        if ended in begun:
            first, kind, count = begun.pop(ended)
            yield kind, count, any(products[first + 1 : at])
        elif message is not None and one.opcode == "recv":
            names[one.name] = message[0]
        elif message is not None:
            name, kind = message
            size = program.computations[computation][one.operands[0]].nbytes
            begun[name] = at, kind + BETWEEN, sent_by(kind, size, slices)
        elif one.opcode.endswith("-done") and one.operands and one.operands[0] in begun:
            first, kind, count = begun.pop(one.operands[0])
            yield kind, count, any(products[first + 1 : at])
        elif (kind := _name(program, one, in_slice)) is not None:
            count = sent_bytes(program, computation, one)
            if one.opcode.endswith("-start"):
                begun[one.name] = at, kind, count
            else:
                yield kind, count, False
        elif one.opcode == "async-start":
            for kind, count in _inside(program, one, in_slice):
                begun[one.name] = at, kind, count
        elif one.opcode == "fusion" and one.name.startswith("async-collective-start"):
            # On TPUs: it is sent by the operations up to the fusion that ends it, which say so
            # once more.
            end = one.name.replace("-start", "-done")
            last = next(i for i, x in enumerate(instructions) if x.name == end)
            for kind, count in _inside(program, one, in_slice):
                yield kind, count, any(products[at + 1 : last])
        elif one.opcode == "fusion" and any(map(_REDUCE_SCATTER.match, one.called)):
            # On TPUs: an all-reduce of which every device keeps a piece, at half of its cost.
            for _, count in _inside(program, one, in_slice):
                yield "reduce-scatter", count // 2, False
    for _, kind, count in begun.values():  # which end in another round of a loop
        yield kind, count, False


# TPUs hand what goes to other slices to their host.
_MESSAGE = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
_MESSAGE_KIND = re.compile(r'_xla_megascale_transfer_type="([^"]*)"')


def _message(one: Instruction) -> tuple[str, str] | None:
    """Name and kind of the message between slices that a TPU begins to send or to receive."""
    name, kind = _MESSAGE.search(one.rest), _MESSAGE_KIND.search(one.rest)
    if one.opcode not in ("send", "recv") or name is None or kind is None:
        return None
    return name[1], kind[1].lower().replace("_", "-")


def _name(program: Program, one: Instruction, in_slice: int) -> str | None:
    """The kind of communication that an instruction is; None where it is none."""
    kind = kind_of(one)
    return kind and kind + BETWEEN * is_between(program, one, in_slice)


_REDUCE_SCATTER = re.compile(r"all-reduce-scatter\b")


def _inside(program: Program, one: Instruction, in_slice: int) -> Iterator[tuple[str, int]]:
    """Kind and bytes of the communications that an instruction consists of."""
    for name in one.called:
        for inner in program.computations[name].values():
            if (kind := _name(program, inner, in_slice)) is not None:
                yield kind, sent_bytes(program, name, inner)


_LARGE = 10**6  # bytes of a product's result: a Gram matrix hides nothing
_LIBRARIES = re.compile(r'custom_call_target="(__cublas|__cudnn|tpu_custom_call)')


def _is_product(program: Program, one: Instruction) -> bool:
    """Whether an instruction is, or contains, a matrix product of some size."""
    if one.opcode == "custom-call":
        return _LIBRARIES.search(one.rest) is not None and one.nbytes > _LARGE
    if one.opcode in ("while", "fusion", "call"):
        return any(
            _is_product(program, inner)
            for name in one.called
            for inner in program.computations[name].values()
        )
    return one.opcode in ("dot", "convolution") and one.nbytes > _LARGE
