"""Note that a run is asked to end, and stop it where nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import jax

from jaxmoo.errors import InterruptedRunError

__all__ = ["StopRequest"]


class StopRequest:
    """While the context is open, SIGINT and SIGTERM are noted rather than obeyed.

    A second SIGINT ends the process at once, whatever it is doing.

    In several processes a signal to any of them counts for all: what :meth:`requested` returns is
    shared (:class:`jaxmoo.runtime.processes.Agreement`) before any of them obeys it.

    Example:
      >>> with StopRequest() as stop:
      ...     stop.requested() is None
      True
    """

    def __init__(self) -> None:
        self._several = jax.process_count() > 1
        self._noted: signal.Signals | None = None
        self._at_once = False
        self._previous: dict[signal.Signals, object] = {}
        self._wakeup = -1

    def __enter__(self) -> StopRequest:
        # Only the main thread may set handlers; elsewhere, whoever runs us handles signals.
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        # Python runs handlers between its own instructions, not while it waits for a device or
        # the compiler. What sees the second SIGINT must not wait.
        self._watched, writer = socket.socketpair()
        self._writer = writer
        writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def _watch(self) -> None:
        interrupts = 0
        while numbers := self._watched.recv(16):
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                os._exit(128 + signal.SIGINT)
            again = "; SIGINT again ends it at once" if interrupts else ""
            name = signal.Signals(numbers[0]).name
            with contextlib.suppress(OSError, ValueError):  # nobody is listening any more
                print(
                    f"\n{name}: stopping where nothing is lost{again}.",
                    file=sys.__stderr__,
                    flush=True,
                )

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = signal.Signals(number)
        if self._at_once and not self._several:
            self._stop()

    def _stop(self) -> None:
        assert self._noted is not None
        raise InterruptedRunError(f"Stopped by {self._noted.name}.", self._noted)

    def requested(self) -> signal.Signals | None:
        """Return the signal that has asked this process to stop, if any."""
        return self._noted

    def ask(self) -> None:
        """Ask to stop as SIGTERM does; from any thread."""
        if self._previous:
            # The main thread is called away from what it waits for.
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._noted = signal.SIGTERM

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Stop wherever it is: for work that leaves nothing behind, and that nobody waits for.

        In several processes nothing is raised: what all have agreed on decides as ever.

        Raises:
          InterruptedRunError: when a signal arrives, or has arrived.
        """
        self._at_once = True
        try:
            self._stop_if_noted()
            yield
        except InterruptedRunError:
            raise
        except Exception:
            # Libraries, and we, turn what goes wrong while a file is read into other errors.
            self._stop_if_noted()
            raise
        finally:
            self._at_once = False
        # Some take what goes wrong for an answer.
        self._stop_if_noted()

    def _stop_if_noted(self) -> None:
        if self._noted and not self._several:
            self._stop()

    def __exit__(self, *_: object) -> None:
        if not self._previous:
            return
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()  # which ends the thread
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
