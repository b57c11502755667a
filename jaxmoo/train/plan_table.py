"""What a plan says of a step, as numbers and as text."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxmoo.data.table import plain_table
from jaxmoo.engine.cost import BETWEEN
from jaxmoo.sizes import format_size
from jaxmoo.train.chip_plan import ChipPlan

__all__ = ["Plan"]

PARAMETERS = "parameters"
OPTIMISER = "optimiser state"
GRADIENT = "resolved gradient"
OBJECTIVES = "per-language gradients of one block"
TAPS = "per-language gradients kept until the end of the pass"
STACK = "per-language gradients of everything"
ACTIVATIONS = "activations kept for the backward pass"
OTHER = "other temporaries"
REST = "batch and diagnostics"

# What makes each of them smaller.
_REMEDIES = {
    PARAMETERS: "use more devices, or model.param_dtype=bfloat16",
    OPTIMISER: "use more devices, or train fewer parameters (model.trainable, lora.rank)",
    GRADIENT: "use more devices, or train fewer parameters (model.trainable, lora.rank)",
    OBJECTIVES: "use smaller blocks (resolve.blocks=module, or more resolve.vocabulary_slices)",
    TAPS: "use blocks that one layer holds (resolve.blocks=layer) and "
    "train.accumulation=resolve_each",
    STACK: "use resolve.engine=backward",
    ACTIVATIONS: "use model.remat=full, more train.microbatches, or a smaller data.batch_size or "
    "data.sequence_length",
    OTHER: "use more train.microbatches, or a smaller data.batch_size or data.sequence_length",
    REST: "use a smaller data.batch_size",
}
_QUANTIZED = ", or, with adapters, lora.quantize_base=nf4"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step costs; per device throughout.

    Attributes:
      axes: sizes of the mesh axes.
      blocks: number of blocks.
      memory: bytes by kind; they add up to ``total``. Arguments and late gradients are exact,
        activations are what the loops over layers keep, gradients of one block are those of the
        largest call; everything else is "other".
      total: bytes at the worst moment.
      collectives: bytes sent by kind; see :func:`jaxmoo.engine.cost.collective_bytes`.
      flops: floating-point operations of a step, if every token is a target.
      late: paths and bytes of parameters whose blocks are resolved after the backward pass.
      compile_seconds: how long the compiler took.
      attention: the implementation of attention.
      parameters: of the model, and how many of these are read for one token.
      chip: what only the chip's own program tells; None for virtual CPUs.
    """

    axes: dict[str, int]
    blocks: int
    memory: dict[str, int]
    total: int
    collectives: dict[str, int]
    flops: float
    late: dict[str, int]
    compile_seconds: float
    attention: str = "xla"
    parameters: tuple[int, int] = (0, 0)
    chip: ChipPlan | None = None

    def advice(self, device_memory: int) -> str:
        """Say whether the step fits a device, and if not what to change.

        Args:
          device_memory: bytes that a device has.
        """
        needed, there = format_size(self.total), format_size(device_memory)
        if self.total <= device_memory:
            return f"Fits: {needed} of {there} per device."
        kind, size = max(self.memory.items(), key=lambda item: item[1])
        more = _QUANTIZED if kind == PARAMETERS else ""
        return (
            f"Does not fit: {needed} needed, {there} there. The largest part is {kind} "
            f"({format_size(size)}): {_REMEDIES[kind]}{more}."
        )

    def table(self, against: Plan | None = None) -> str:
        """Return the plan as text.

        Args:
          against: another plan to stand beside it, such as that of ordinary fine-tuning.
        """
        shape = " x ".join(f"{name} {size}" for name, size in self.axes.items())
        what = "devices" if self.chip is None else f"chips, {self.chip.place}"
        lines = [f"{math.prod(self.axes.values())} {what} ({shape}), {self.blocks} blocks"]
        total, read = self.parameters
        if read < total:
            lines.append(f"{total:,} parameters, of which {read:,} are read for one token")
        others = {} if against is None else against._sections()
        for title, section in self._sections().items():
            lines += ["", _rows(title, section, others.get(title, {}), beside=against is not None)]
        return "\n".join([*lines, *self._notes()])

    def _sections(self) -> dict[str, dict[str, Quantity]]:
        """Everything that is counted, by title and name."""
        found: dict[str, dict[str, Quantity]] = {}

        def section(title: str, items: Mapping[str, float], show: Callable[[float], str]) -> None:
            if items:
                whole = {**items, _TOTAL: sum(items.values())}
                found[title] = {name: Quantity(count, show(count)) for name, count in whole.items()}

        section("memory per device", self.memory, format_size)
        section("resolved after the backward pass", self.late, format_size)
        wired, between = _by_way(self.collectives)
        section("sent per device and step", wired, format_size)
        section("sent between slices per device and step", between, format_size)
        if self.chip is not None:
            wired, between = _by_way({k: sent.exposed for k, sent in self.chip.sent.items()})
            section("of these with no product beside them", wired, format_size)
            section("between slices with no product beside them", between, format_size)
            if self.chip.launches is not None:
                section("kernels started per step", self.chip.launches.parts, "{:,.0f}".format)
            if self.chip.cycles is not None:
                section("cycles expected, in millions", self.chip.cycles.parts, _millions)
        found["work per device and step"] = {
            "products": Quantity(self.flops, f"{self.flops / 1e12:,.2f} TFLOP")
        }
        return found

    def _notes(self) -> list[str]:
        chip = self.chip
        if chip is None:
            return [
                f"compiled in {self.compile_seconds:.0f} s for CPUs: elsewhere temporaries of "
                "bfloat16 and of attention are smaller"
            ]
        notes = []
        least = chip.least_seconds(self.flops)
        if least is not None:
            notes.append(f"at the chip's peak the products would take {least:.3f} s")
        if chip.conflict_share is not None:
            notes.append(
                f"cycles of conflicts by name are {chip.conflict_share:.1%} of the others; "
                "communication and hand-written kernels have no estimate"
            )
        for counted, what in ((chip.launches, "kernels"), (chip.cycles, "cycles")):
            if counted is not None and counted.per_round:
                rounds = sum(counted.per_round.values())
                notes.append(
                    f"and {rounds:,} {what} for one round of each loop whose number of rounds "
                    f"depends on the data ({len(counted.per_round)} of them)"
                )
        notes.append(f"attention: {self.attention}")
        notes.append(f"compiled in {self.compile_seconds:.0f} s by the compiler for {chip.place}")
        return notes


_TOTAL = "total"


class Quantity(NamedTuple):
    """A number and how it is shown."""

    value: float
    text: str


def _by_way(sent: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """What is sent within slices and what between them, by kind."""
    between = {kind: count for kind, count in sent.items() if BETWEEN in kind}
    wired = {kind: count for kind, count in sent.items() if kind not in between}
    return wired, {kind.replace(BETWEEN, ""): count for kind, count in between.items()}


def _millions(count: float) -> str:
    return f"{count / 1e6:,.2f}"


def _rows(
    title: str, items: Mapping[str, Quantity], others: Mapping[str, Quantity], *, beside: bool
) -> str:
    nothing = Quantity(0, "-")
    rows = [["", "this", "plain", "ratio"]] if beside else []
    names = dict.fromkeys([*items, *others])
    for name in sorted(names, key=lambda name: name == _TOTAL):  # which comes last
        one, other = items.get(name, nothing), others.get(name, nothing)
        ratio = f"{one.value / other.value:.3f}" if other.value else ""
        rows.append([name, one.text, other.text, ratio] if beside else [name, one.text])
    alignment = ("left", *["right"] * (len(rows[0]) - 1))
    return f"{title}\n{textwrap.indent(plain_table(rows, alignment), '  ')}"
