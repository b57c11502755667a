"""Processes of one run on this machine, started together, and again when one of them is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NamedTuple

__all__ = ["LOST", "Ended", "Workers"]

# What a process ends with when another one was lost: JAX's runtime aborts it.
LOST = 128 + signal.SIGABRT
# Signals that someone sends to a process for its own sake, or it brings upon itself.
_ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGABRT)
_LOOK = 0.05


class Ended(NamedTuple):
    """How processes that were started together have ended.

    Attributes:
      code: the exit code of the first that failed, which is why the others ended; 0 if none did.
        That of a signal N is 128 + N.
      lost: the places of those that were killed or crashed by themselves.
    """

    code: int
    lost: tuple[int, ...]


class Workers:
    """Starts a command several times, each told of the others as JAX expects it.

    SIGTERM and SIGINT to this process are passed on. When a process is lost, the others, which
    cannot go on without it, end by themselves with code 134; those that do not within a time are
    killed.

    Args:
      command: the command and its arguments.
      patience: seconds from the first that fails until the others are killed.
      devices: GPUs of each, where there are any.
    """

    def __init__(self, command: Sequence[str], *, patience: float, devices: int = 1) -> None:
        self._command, self._patience, self._devices = list(command), patience, devices
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self.asked: signal.Signals | None = None

    @contextlib.contextmanager
    def passing_signals(self) -> Iterator[None]:
        """Pass signals on to the processes while the context is open."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._pass_on) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def run(
        self,
        places: Sequence[int],
        started: Callable[[int, int], object] = lambda place, pid: None,
    ) -> Ended:
        """Start a process for each place and wait for all of them.

        Args:
          places: which of the machine's GPUs each process gets, where there are any; counted in
            as many as each has.
          started: called with each place and the number of its process.
        """
        address = f"127.0.0.1:{_free_port()}"
        try:
            for number, place in enumerate(places):
                first = place * self._devices
                environment = os.environ | {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(len(places)),
                    "JAX_PROCESS_ID": str(number),
                    "JAX_CUDA_VISIBLE_DEVICES": ",".join(
                        map(str, range(first, first + self._devices))
                    ),
                }
                # In a session of its own: a terminal's Ctrl-C reaches it once, through this one.
                process = subprocess.Popen(self._command, env=environment, start_new_session=True)
                self._running[place] = process
                started(place, process.pid)
            if self.asked is not None:  # meanwhile
                self._pass_on(self.asked, None)
            return self._wait()
        finally:
            for process in self._running.values():
                process.kill()
                process.wait()
            self._running = {}

    def _wait(self) -> Ended:
        first, lost, deadline = 0, [], float("inf")
        while self._running:
            for place, process in list(self._running.items()):
                code = process.poll()
                if code is None:
                    continue
                del self._running[place]
                if code and not first:
                    first = code if code > 0 else 128 - code
                    deadline = time.monotonic() + self._patience
                if code < 0 and -code not in _ASKED and time.monotonic() < deadline:
                    lost.append(place)
            if time.monotonic() >= deadline:
                for process in self._running.values():
                    process.kill()
                deadline = float("-inf")  # those killed here were not lost
            time.sleep(_LOOK)
        return Ended(first, tuple(lost))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
