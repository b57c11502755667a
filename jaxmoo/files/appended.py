"""Files that grow line by line, on a disk or in a bucket, where nothing can be appended to."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
import weakref
from pathlib import Path

from jaxmoo.files.buckets import is_bucket

__all__ = ["Appended", "send_appended"]

# Seconds between two times that an object in a bucket is written anew, and the largest share of the
# time that may be spent on it.
_EVERY, _SHARE = 10.0, 0.05
_OPEN: weakref.WeakSet[Appended] = weakref.WeakSet()


class Appended:
    """A text file to append to.

    What is appended to a file of this machine is there at once. An object in a bucket is written
    anew in the background every few seconds, at the end, and by :func:`send_appended`.

    Args:
      path: the file; what it holds already stays.

    Raises:
      OSError: it cannot be read or opened.

    Example:
      >>> from jaxmoo.files.outputs import typed_path
      >>> file = Appended(typed_path("memory://bucket/rows.jsonl"))
      >>> file.write("1\\n"); file.write("2\\n"); file.close()
      >>> typed_path("memory://bucket/rows.jsonl").read_text()
      '1\\n2\\n'
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = None if is_bucket(path) else path.open("a", encoding="utf-8")
        if self._file is not None:
            return
        self._parts: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            self._parts.append(path.read_text("utf-8"))
        self._sent, self._next = len(self._parts), time.monotonic() + _EVERY
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._sending: concurrent.futures.Future[None] | None = None
        _OPEN.add(self)

    def write(self, text: str) -> None:
        """Append a text. What does not get to a bucket is sent again with what comes later.

        Raises:
          OSError: the disk is full.
        """
        if self._file is not None:
            self._file.write(text)
            self._file.flush()
            return
        self._parts.append(text)
        if time.monotonic() > self._next and (self._sending is None or self._sending.done()):
            self._send()

    def sync(self) -> None:
        """Wait until all is there.

        Raises:
          OSError: it did not get there.
        """
        if self._file is None:
            failed = self._sending is not None and self._sending.exception() is not None
            if failed or self._sent < len(self._parts):
                self._send()
            if self._sending is not None:
                self._sending.result()

    def close(self) -> None:
        """Wait until all is there, and close the file."""
        if self._file is not None:
            self._file.close()
            return
        _OPEN.discard(self)
        try:
            self.sync()
        finally:
            self._pool.shutdown()

    def _send(self) -> None:
        self._parts = ["".join(self._parts)]
        self._sent, self._next = 1, time.monotonic() + _EVERY
        self._sending = self._pool.submit(self._write, self._parts[0])

    def _write(self, text: str) -> None:
        begun = time.monotonic()
        self._path.write_text(text, "utf-8")
        now = time.monotonic()
        self._next = now + max(_EVERY, (now - begun) / _SHARE)


def send_appended() -> None:
    """Send what has been appended to all files in buckets, and wait until it is there.

    Raises:
      OSError: it did not get there.
    """
    for file in list(_OPEN):
        file.sync()
