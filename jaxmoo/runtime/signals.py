"""Stop a run, in all its processes at the same place, when it is asked to end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

import jax

from jaxmoo.errors import InterruptedRunError
from jaxmoo.runtime.processes import Agreement

__all__ = ["StopRequest"]


class StopRequest:
    """While the context is open, SIGINT and SIGTERM are noted rather than obeyed.

    A second SIGINT ends the process at once, whatever it is doing.

    In several processes a signal to any of them counts for all. Each :meth:`requested` sends what
    this process has noted to all others, as one number that the devices add to their queue, and
    reads what was sent the time before: the host waits for nothing, and all read the same.

    Example:
      >>> with StopRequest() as stop:
      ...     stop.requested() is None
      True
    """

    def __init__(self) -> None:
        self._several = jax.process_count() > 1
        self._noted: signal.Signals | None = None
        self._agreed = Agreement() if self._several else None
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
        """Return the signal that asks to stop here, if any.

        Every process must call this equally often.
        """
        if self._agreed is None:
            return self._noted
        number = self._agreed.exchange(self._noted or 0)
        return signal.Signals(number) if number else None

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Stop wherever it is: for work that leaves nothing behind, and that nobody waits for.

        In several processes, the next :meth:`requested` decides as ever.

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._previous:
            return
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()  # which ends the thread
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
