"""How a process is told of the others that run the same program."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Launch"]


class Launch(NamedTuple):
    """How this process was told of the others; None where it was not.

    Attributes:
      coordinator: ``host:port`` of process 0.
      processes: their number.
      process: which one this is, from 0.
      detect: look for them in any case, as ``jax.distributed.initialize()`` does.
      heartbeat: seconds after which a process that is not heard of is taken for dead, and all
        others are ended.
      patience: seconds to wait at the start until all have come.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    detect: bool = False
    heartbeat: int = 100
    patience: int = 300
