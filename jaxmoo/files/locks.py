"""Who may write to a directory: on a disk by a lock of the system, in a bucket by an object.

The object in a bucket says who holds the lock, and its holder writes it anew every few seconds. Who
finds one that has not changed for a while takes it over: no clocks are compared, only the waiting
one's own time is measured, which no setting of a clock changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from jaxmoo.files.buckets import BucketPath

__all__ = ["BEAT", "EXPIRY", "BucketLock", "Lock", "Timeout", "lock_of"]

BEAT = 10.0  # seconds between two signs of life
EXPIRY = 45.0  # seconds without one after which a holder is taken for dead


class Lock(Protocol):
    """What keeps others out."""

    def acquire(self, timeout: float) -> Any:
        """Take the lock, or raise `Timeout` if somebody else keeps it for so many seconds."""
        ...

    def release(self) -> None:
        """Give it back; nothing happens where it is not held."""
        ...


def lock_of(path: Path) -> Lock:
    """Return the lock of a path, not yet taken.

    Args:
      path: where the lock's file or object is, or will be.
    """
    return BucketLock(path) if isinstance(path, BucketPath) else FileLock(path)


class BucketLock:
    """A lock that is an object.

    A holder that finds the lock in other hands, because it stood still for longer than `expiry`,
    calls `lost`: by default the process ends at once, for two must not write to one place.

    Args:
      path: the object.
      beat: seconds between two signs of life.
      expiry: seconds without one after which a holder is taken for dead.
      lost: called in another thread.

    Example:
      >>> a, b = (BucketLock(BucketPath("memory://bucket/.lock")) for _ in range(2))
      >>> a.acquire(timeout=0)
      >>> try:
      ...     b.acquire(timeout=0)
      ... except Timeout as error:
      ...     print(error)
      The file lock 'memory://bucket/.lock' could not be acquired.
      >>> a.release(); b.acquire(timeout=0); b.release()
    """

    def __init__(
        self,
        path: BucketPath,
        *,
        beat: float = BEAT,
        expiry: float = EXPIRY,
        lost: Callable[[BucketPath], None] | None = None,
    ) -> None:
        self._path, self._beat, self._expiry = path, beat, expiry
        self._lost = _end if lost is None else lost
        self._token = uuid.uuid4().hex
        self._beats = 0
        self._held = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, timeout: float) -> None:
        """Take the lock.

        Args:
          timeout: seconds for which a holder that is alive is waited for. To see that it is, on
            another machine, takes some seconds more; to see that it is dead, `expiry`.

        Raises:
          Timeout: somebody else holds it.
          OSError: the bucket cannot be read or written.
        """
        begun = seen_at = time.monotonic()
        seen = self._read()
        alive = False
        while True:
            dead = _fate(seen) is False or time.monotonic() - seen_at > self._expiry
            if (seen is None or dead) and self._take(seen):
                break
            alive = alive or _fate(seen) is True
            if alive and time.monotonic() - begun >= timeout:
                raise Timeout(str(self._path))
            time.sleep(min(1.0, self._beat / 4))
            found = self._read()
            if found != seen:
                alive = alive or (seen is not None and found is not None)
                seen, seen_at = found, time.monotonic()
        self._held = True
        self._stop.clear()
        self._thread = threading.Thread(target=self._live, name="bucket lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back."""
        if not self._held:
            return
        self._held = False
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        # If the bucket is gone now, the lock expires.
        with contextlib.suppress(OSError):
            if self._is_own(self._read()):
                self._path.unlink(missing_ok=True)

    def _take(self, seen: bytes | None) -> bool:
        """Take a lock that nobody holds, or one whose holder, who wrote this, is dead."""
        if seen is not None:
            if self._read() != seen:
                return False
            self._path.unlink(missing_ok=True)
        if not self._path.create(self._content()):
            return False
        if seen is not None:  # of two who took it at one time, one has written later
            time.sleep(min(1.0, self._beat / 4))
        return self._is_own(self._read())

    def _live(self) -> None:
        while not self._stop.wait(self._beat):
            # A bucket that cannot be reached for a while is tried again.
            with contextlib.suppress(OSError):
                found = self._read()
                if not self._stop.is_set() and found is not None and not self._is_own(found):
                    self._lost(self._path)
                    return
                self._path.write_bytes(self._content())

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def _is_own(self, content: bytes | None) -> bool:
        return content is not None and _parsed(content).get("token") == self._token

    def _content(self) -> bytes:
        self._beats += 1
        holder = {"token": self._token, "beat": self._beats, "machine": _machine()}
        return json.dumps(holder | {"process": os.getpid(), "since": _since(os.getpid())}).encode()


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _fate(content: bytes | None) -> bool | None:
    """Whether the holder, if it is a process of this machine, is alive; None where unknown."""
    holder = {} if content is None else _parsed(content)
    number, machine = holder.get("process"), _machine()
    if not machine or holder.get("machine") != machine or not isinstance(number, int):
        return None
    return _since(number) == holder.get("since")


def _machine() -> str:
    """Name what numbers processes here, since it was last started; empty where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _since(process: int) -> str:
    """When a process began, in the system's ticks; empty where there is none."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    # The name in front may hold anything. A process that has ended, but not been waited for, is Z.
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]


def _end(path: BucketPath) -> None:
    print(
        f"error: {path}: another process has taken this one for dead and works here now. This one "
        "ends; what it saved is whole.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
