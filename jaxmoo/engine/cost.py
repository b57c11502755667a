"""What a program costs, counted before it runs: bytes between devices, memory, FLOPs.

Bytes and memory are read from the compiled program, so they are those of what really runs, with
everything that the compiler merged, removed or moved.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxmoo.engine.hlo import Instruction, Program
from jaxmoo.engine.jaxprs import inner_jaxprs
from jaxmoo.mesh import DATA

__all__ = [
    "BETWEEN",
    "PER_ROUND",
    "Collective",
    "collective_bytes",
    "collectives",
    "compile_to_count",
    "flops",
    "is_between",
    "kind_of",
    "memory",
    "sent_by",
    "sent_bytes",
    "traced_collective_bytes",
]

# Suffix of what is counted once in a loop whose number of rounds depends on the data.
PER_ROUND = " per round"
# Suffix of what devices of several slices do together.
BETWEEN = " between slices"


class Collective(NamedTuple):
    """One communication of a compiled program.

    Attributes:
      kind: ``all-gather``, ``reduce-scatter``, ``all-to-all``, ``all-reduce`` or
        ``collective-permute``.
      bytes: bytes that each device sends each time.
      times: how often a call of the program executes it; in a loop of unknown length, how often a
        round of that loop does.
      counted: whether ``times`` is for the whole call.
      between: whether devices of several slices take part.
      source: the operation of the traced program it comes from.
    """

    kind: str
    bytes: int
    times: int
    counted: bool
    between: bool
    source: str

    @property
    def name(self) -> str:
        """Its kind, with the suffixes that apply."""
        between, per_round = BETWEEN * self.between, PER_ROUND * (not self.counted)
        return f"{self.kind}{between}{per_round}"


def compile_to_count(lowered: Any) -> Any:
    """Compile a program for the CPU that will not be run, in half the time.

    Only machine code is optimised less: memory and communication are those of the program that
    runs.

    Args:
      lowered: ``jax.jit(f).lower(...)``.
    """
    return lowered.compile(
        compiler_options={
            "xla_backend_optimization_level": 0,
            "xla_llvm_disable_expensive_passes": True,
        }
    )


def collective_bytes(compiled: Any, slices: int = 1) -> dict[str, int]:
    """Count the bytes that each device sends in one call of a compiled program.

    Of N devices that communicate, each sends, as the usual ring algorithms do: (N - 1) times its
    input for an all-gather; (N - 1) / N of its input for a reduce-scatter or an all-to-all; twice
    that for an all-reduce; its input for a collective-permute. A loop multiplies what is in it by
    its number of rounds. Of a conditional, all branches are counted.

    Args:
      compiled: ``jax.jit(f).lower(...).compile()``, for CPUs. Those of GPUs and TPUs spread one
        communication over several instructions: :func:`jaxmoo.engine.chip_cost.sent` counts it.
      slices: among how many slices the devices are divided, in the order of the mesh.

    Returns:
      Bytes by kind of communication; those of devices of several slices by themselves, with the
      suffix ``" between slices"``. What happens in a loop whose number of rounds depends on the
      data is counted for one round, by itself, under the kind with the suffix ``" per round"``.

    Raises:
      ValueError: the program's text is not as expected.
    """
    total: Counter[str] = Counter()
    for one in collectives(compiled, slices):
        total[one.name] += one.bytes * one.times
    return dict(total)


def collectives(compiled: Any, slices: int = 1) -> list[Collective]:
    """List every communication of a compiled program.

    Args:
      compiled: ``jax.jit(f).lower(...).compile()``.
      slices: see :func:`collective_bytes`.

    Raises:
      ValueError: the program's text is not as expected.
    """
    program = Program(compiled.as_text())
    return [
        Collective(
            kind=kind,
            bytes=sent_bytes(program, visit.computation, visit.instruction),
            times=visit.times,
            counted=not visit.loops,
            between=is_between(program, visit.instruction, program.devices // slices),
            source=visit.instruction.source,
        )
        for visit in program.walk(into=None)
        if (kind := kind_of(visit.instruction)) is not None
    ]


def memory(compiled: Any) -> dict[str, int]:
    """Read a compiled program's memory per device, in bytes.

    Args:
      compiled: ``jax.jit(f).lower(...).compile()``.

    Returns:
      ``arguments``, ``outputs``, ``aliased`` (outputs that take the place of donated arguments),
      ``temporaries`` and ``peak``, everything that exists at the worst moment.
    """
    stats = compiled.memory_analysis()
    found = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
    }
    found["peak"] = found["arguments"] + found["outputs"] - found["aliased"] + found["temporaries"]
    return found


def flops(jaxpr: Any, devices: int = 1) -> dict[str, float]:
    """Count the floating-point operations per device of matrix products and convolutions.

    A multiplication and its addition are two operations. What a pass computes again is counted
    again. Of a conditional, all branches are counted.

    Args:
      jaxpr: the traced program, such as ``jax.make_jaxpr(f)(...)``.
      devices: number of devices. What the program leaves to the compiler to divide, by
        ``shard_map`` or outside of it, is taken to be divided evenly.

    Returns:
      ``total``, and ``per round``: the work of one round of all loops whose number of rounds
      depends on the data.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.ones((4, 4))
      >>> program = jax.make_jaxpr(lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, length=3))
      >>> flops(program(x))
      {'total': 384.0, 'per round': 0.0}
    """
    counts = {"total": 0.0, PER_ROUND.strip(): 0.0}
    for step in _steps(jaxpr):
        count = _PRODUCTS.get(step.equation.primitive.name)
        if count is not None:
            share = math.prod(step.axes.values()) / devices
            kind = "total" if step.counted else PER_ROUND.strip()
            counts[kind] += share * step.times * count(step.equation)
    return counts


def traced_collective_bytes(jaxpr: Any, slices: int = 1) -> dict[str, int]:
    """Count, before it is compiled, the bytes that each device sends in one call of a program.

    Unlike :func:`collective_bytes` it sees only communication that the program itself asks for,
    inside of ``shard_map``, and sees it in the program's own precision: compilers for CPUs send
    bfloat16 as float32.

    Args:
      jaxpr: the traced program, such as ``jax.make_jaxpr(f)(...)``.
      slices: among how many slices the mesh's ``data`` axis is divided.

    Returns:
      See :func:`collective_bytes`.
    """
    total: Counter[str] = Counter()
    for step in _steps(jaxpr):
        equation = step.equation
        kind = _COLLECTIVES.get(equation.primitive.name)
        if kind is None or not step.axes:
            continue
        axes = equation.params["axes" if kind == "all-reduce" else "axis_name"]
        axes = axes if isinstance(axes, tuple) else (axes,)
        devices = math.prod(step.axes[axis] for axis in axes)
        size = sum(x.aval.size * x.aval.dtype.itemsize for x in equation.invars)
        if devices > 1:
            between = slices > 1 and DATA in axes
            one = Collective(
                kind, round(_SENT[kind](size, devices)), step.times, step.counted, between, ""
            )
            total[one.name] += one.bytes * one.times
    return dict(total)


# --- Compiled programs, as text ---------------------------------------------------------------

_SENT = {
    "all-gather": lambda size, n: size * (n - 1),
    "reduce-scatter": lambda size, n: size * (n - 1) // n,
    "all-to-all": lambda size, n: size * (n - 1) // n,
    "all-reduce": lambda size, n: 2 * size * (n - 1) // n,
    "collective-permute": lambda size, n: size,
}


def kind_of(instruction: Instruction) -> str | None:
    """The kind of communication that an instruction is, or begins; None where it is none."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in _SENT else None


def sent_bytes(program: Program, computation: str, instruction: Instruction) -> int:
    """Bytes that each device sends by one communication.

    Args:
      program: the program.
      computation: name of the computation that the instruction stands in.
      instruction: one that has a kind; see :func:`kind_of`.

    Raises:
      ValueError: its text is not as expected.
    """
    kind = kind_of(instruction) or ""
    mine = program.computations[computation]
    size = sum(mine[name].nbytes for name in instruction.operands)
    return sent_by(kind, size, len(_group(program, kind, instruction.rest)))


def sent_by(kind: str, size: int, devices: int) -> int:
    """Bytes that each of some devices sends, given the bytes of its input."""
    return _SENT[kind](size, devices)


def is_between(program: Program, instruction: Instruction, in_slice: int) -> bool:
    """Whether a communication is one of devices of several slices.

    Args:
      program: the program.
      instruction: one that has a kind; see :func:`kind_of`.
      in_slice: number of devices in a slice.
    """
    if in_slice >= program.devices:
        return False
    kind, rest = kind_of(instruction) or "", instruction.rest
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{[\d,]+\},?)*)\}", rest)
        groups = re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if pairs else []
    else:
        groups = [_group(program, kind, rest)]
    return any(len({int(member) // in_slice for member in group}) > 1 for group in groups)


def _group(program: Program, kind: str, rest: str) -> list[int]:
    """Numbers of the devices that communicate, in one of the groups that do so side by side."""
    everyone = list(range(program.devices))
    if kind == "collective-permute":
        return everyone
    if found := _LIST.search(rest):
        return _laid_out(found[2], found[3]).reshape(-1, int(found[1]))[0].tolist()
    if found := _MESH.search(rest):
        members = _group_of_axes(dict(re.findall(r"'(\w+)'=(\d+)", found[1])), found[4])
        return _laid_out(found[2], found[3])[members].tolist() if found[2] else members
    found = re.search(r"replica_groups=\{(?:\{([\d,]*)\}|\})", rest)
    if not found:
        raise ValueError(f"expected replica_groups of an {kind}, found {rest[:200]!r}")
    return [int(n) for n in found[1].split(",")] if found[1] else everyone


# How devices are laid out: a shape and, if its axes are not in order, their order.
_LAYOUT = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
# The size of a group, and the devices, group after group.
_LIST = re.compile(rf"replica_groups=\[\d+,(\d+)\]<={_LAYOUT}")
# Sizes of axes, the devices if they are not in order, and the axes of a group.
_MESH = re.compile(
    rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_LAYOUT}\))? ?\{{([^}}]*)\}}"
)


def _laid_out(shape: str, order: str | None) -> np.ndarray:
    """The numbers of devices, one after the other."""
    sizes = [int(n) for n in shape.split(",")]
    axes = [int(n) for n in order.split(",")] if order else range(len(sizes))
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(axes).ravel()


def _group_of_axes(sizes: dict[str, str], axes: str) -> list[int]:
    """The devices of a mesh along some axes, beginning with the first device."""
    stride, strides = 1, {}
    for name, size in reversed(sizes.items()):
        strides[name] = stride
        stride *= int(size)
    members = [0]
    # Part of an axis is written as 'a':(1)2, where 2 is its size, and 1 that of what is outside.
    for name, outside, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
        count = int(part or sizes[name])
        step = strides[name] * (int(sizes[name]) // (int(outside or 1) * count))
        members = [member + i * step for member in members for i in range(count)]
    return members


# --- Traced programs --------------------------------------------------------------------------

_COLLECTIVES = {
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "ppermute": "collective-permute",
}


class _Step(NamedTuple):
    equation: Any
    times: int
    counted: bool  # whether times is for the whole call, or for a round of a loop
    axes: dict[str, int]  # sizes of the mesh axes that shard_map has divided everything by


def _steps(
    jaxpr: Any, times: int = 1, counted: bool = True, axes: dict[str, int] | None = None
) -> Iterator[_Step]:
    """Walk through a traced program: every primitive operation and how often it is executed."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, inner = equation.primitive.name, axes or {}
        subs = list(inner_jaxprs(equation))
        if not subs:
            yield _Step(equation, times, counted, inner)
            continue
        if name == "shard_map":
            inner = divided_axes(equation)
        rounds = equation.params["length"] if name == "scan" else 1
        for sub in subs:
            yield from _steps(sub, times * rounds, counted and name != "while", inner)


def divided_axes(equation: Any) -> dict[str, int]:
    """Sizes of the mesh axes by which a ``shard_map`` divides what is inside of it."""
    params = equation.params
    # JAX 0.10 calls them newly_manual_axes, other versions manual_axes.
    axes = next(params[name] for name in params if name.endswith("manual_axes"))
    return {axis: params["mesh"].shape[axis] for axis in axes}


def _dot_general(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2.0 * equation.outvars[0].aval.size * depth


def _convolution(equation: Any) -> float:
    kernel = equation.invars[1].aval
    features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * equation.outvars[0].aval.size * kernel.size / features


_PRODUCTS = {"dot_general": _dot_general, "conv_general_dilated": _convolution}
