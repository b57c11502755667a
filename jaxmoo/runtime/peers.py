"""Processes that divide work which has nothing to do with devices, and tell each other of it."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmoo.errors import DataError, InterruptedRunError

__all__ = ["Peers", "all_peers"]

T = TypeVar("T")
_DONE, _TELLS, _FAILED = b"d", b"t", b"f"


class Peers:
    """The processes of a run, as one of them sees them.

    Args:
      number: which one this is, from 0.
      count: how many there are.
      exchange: gives all processes, which all have to call it, what each of them gives.

    Attributes:
      number: which one this is.
      count: how many there are.

    Example:
      >>> alone = Peers()
      >>> alone.exchange(b"this"), alone.tell([1]), alone.union({b"a"}), alone.all_do(lambda: 7)
      ([b'this'], [[1]], {b'a'}, 7)
    """

    def __init__(
        self,
        number: int = 0,
        count: int = 1,
        exchange: Callable[[bytes], list[bytes]] = lambda told: [told],
    ) -> None:
        self.number, self.count, self.exchange = number, count, exchange

    def tell(self, what: Any) -> list[Any]:
        """Return what all processes tell each other.

        Args:
          what: what this one tells, as JSON holds it.
        """
        return [json.loads(one) for one in self.exchange(json.dumps(what).encode())]

    def all_do(self, work: Callable[[], T]) -> T:
        """Do a part of some work; wait until all have done theirs.

        Within it, `union` may be called. If one fails, all do.

        Args:
          work: this process's part.

        Raises:
          DataError: another process has failed; what it says.
        """
        try:
            result = work()
        except _ElsewhereError as error:
            raise DataError(str(error)) from None
        except InterruptedRunError:  # the others are told to stop, or end as this one is gone
            raise
        except Exception as error:
            if self.count > 1:
                self.exchange(_FAILED + f"{error or type(error).__name__}".encode(errors="replace"))
            raise
        told = [_TELLS]
        try:
            while any(one[:1] == _TELLS for one in told):  # what others still tell each other
                told = self.exchange(_DONE)
                _check(told)
        except _ElsewhereError as error:
            raise DataError(str(error)) from None
        return result

    def union(self, mine: set[bytes]) -> set[bytes]:
        """Return the union of what all processes have that are at this point of their work.

        Args:
          mine: what this one has: texts of 16 bytes.
        """
        told = self.exchange(_TELLS + b"".join(sorted(mine)))
        _check(told)
        return {one[at : at + 16] for one in told for at in range(1, len(one), 16)}

    def here(self) -> int:
        """Return how many of the processes are on this machine."""
        names = self.exchange(socket.gethostname().encode())
        return names.count(names[self.number])


class _ElsewhereError(Exception):
    """Another process has failed."""


def _check(told: Sequence[bytes]) -> None:
    for number, one in enumerate(told):
        if one[:1] == _FAILED:
            raise _ElsewhereError(f"Process {number}: {one[1:].decode()}")


def all_peers() -> Peers:
    """Return the processes of this run."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return Peers()
    return Peers(jax.process_index(), jax.process_count(), _gather)


def _gather(told: bytes) -> list[bytes]:
    sizes = multihost_utils.process_allgather(np.int32(len(told)))
    mine = np.zeros(sizes.max(), np.uint8)
    mine[: len(told)] = np.frombuffer(told, np.uint8)
    every = multihost_utils.process_allgather(mine)
    return [row[:size].tobytes() for row, size in zip(every, sizes, strict=True)]
