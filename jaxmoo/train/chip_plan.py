"""What a step costs on a chip that need not be here, as numbers and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxmoo.engine import chip_cost
from jaxmoo.engine.chip_cost import Cost, Sent
from jaxmoo.engine.hlo import Program
from jaxmoo.train.chips import Slice
from jaxmoo.train.throughput import peak_flops

__all__ = ["ChipPlan"]


@dataclasses.dataclass(frozen=True)
class ChipPlan:
    """What the program of a chip's own compiler says of a step; per device throughout.

    Attributes:
      place: the slice, such as ``h100:8``.
      memory: bytes that a program may use.
      peak: dense bfloat16 FLOP/s of one chip; None where it is not known.
      sent: bytes by kind of communication; see :class:`~jaxmoo.engine.chip_cost.Sent`.
      launches: kernels started, on a GPU.
      cycles: cycles expected, on a TPU.
    """

    place: str
    memory: int
    peak: float | None
    sent: dict[str, Sent]
    launches: Cost | None
    cycles: Cost | None

    @classmethod
    def of(cls, place: Slice, devices: Sequence[Any], compiled: Any, slices: int = 1) -> ChipPlan:
        """Read it off a compiled program.

        Args:
          place: the slice.
          devices: its devices.
          compiled: from :func:`~jaxmoo.train.chips.compile_for`.
          slices: among how many slices the devices are divided.
        """
        program = Program(compiled.as_text())
        gpu = place.chip.platform == "gpu"
        return cls(
            place=place.name,
            memory=place.chip.memory,
            peak=peak_flops(devices[0]),
            sent=chip_cost.sent(program, slices, len(devices)),
            launches=chip_cost.launches(program) if gpu else None,
            cycles=None if gpu else chip_cost.cycles(program),
        )

    @property
    def conflict_share(self) -> float | None:
        """What conflicts add by name, of the cycles of everything else; None on a GPU."""
        if self.cycles is None:
            return None
        return self.cycles.conflicts / (self.cycles.total - self.cycles.conflicts)

    def least_seconds(self, flops: float) -> float | None:
        """The time of a step at the chip's peak, which no step reaches.

        Args:
          flops: floating-point operations of a step per device.
        """
        return None if self.peak is None else flops / self.peak
