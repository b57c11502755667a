"""Notices that a machine will be taken away, beside signals: a file, Google Cloud's metadata."""

from __future__ import annotations

import contextlib
import http.client
import os
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from jaxmoo.errors import ConfigError
from jaxmoo.files.outputs import typed_path

__all__ = ["check_stop_file", "metadata_host", "watch_for_notices"]

# Seconds between two looks; a spot machine has 30 from its notice to its end.
_EVERY = 3.0
_TIMEOUT = 2.0
# Of Google's own libraries: where the metadata server is, if it has been moved.
_HOST = "GCE_METADATA_HOST"
_PRODUCT = Path("/sys/class/dmi/id/product_name")


def metadata_host(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the host of Google Cloud's metadata server, or None on other machines.

    Nothing is sent to find out: the machine's maker says so, as Google's own libraries ask.

    Example:
      >>> metadata_host({"GCE_METADATA_HOST": "localhost:8080"})
      'localhost:8080'
    """
    if _HOST in environment:
        return environment[_HOST] or None
    with contextlib.suppress(OSError):
        if _PRODUCT.read_text("utf-8").strip().startswith("Google"):
            return "metadata.google.internal"
    return None


def check_stop_file(path: str | None) -> None:
    """Raise if the file that would stop a run is there before it begins.

    Raises:
      ConfigError: names it.
    """
    if path is not None and typed_path(path).exists():
        raise ConfigError(
            f"train.stop_file: {path} is there, and would stop the run at once. Remove it first."
        )


@contextlib.contextmanager
def watch_for_notices(
    stop_file: str | None,
    *,
    stop: Callable[[], None],
    save: Callable[[], None],
    every: float = _EVERY,
) -> Iterator[None]:
    """Watch for notices while the context is open, in a thread of its own.

    A file that appears, and a spot or preemptible machine that is being taken away, stop the run.
    The notice of a maintenance that will end the machine, which comes up to an hour before, only
    makes it save: it may go on until the signal.

    Args:
      stop_file: the file; None watches none.
      stop: called once when the run is to be stopped.
      save: called once per notice of a maintenance.
      every: seconds between two looks.
    """
    host, file = metadata_host(), None if stop_file is None else typed_path(stop_file)
    if host is None and file is None:
        yield
        return
    closed = threading.Event()

    def watch() -> None:
        maintenance = False
        while not closed.wait(every):
            reason = None
            # A bucket, or a network's disk, that cannot be reached is looked at again.
            with contextlib.suppress(OSError):
                if file is not None and file.exists():
                    reason = f"{file} has appeared"
            if host is not None:
                event = _metadata(host, "maintenance-event")
                # Others are migrated, and do not notice.
                if event.startswith("TERMINATE"):
                    if not maintenance:
                        _tell(f"This machine will be taken away for maintenance ({event}): saving.")
                        save()
                    maintenance = True
                elif event:
                    maintenance = False
                if _metadata(host, "preempted") == "TRUE":
                    reason = "This machine is being taken away (preempted)"
            if reason is not None and not closed.is_set():
                _tell(f"{reason}: stopping as on SIGTERM.")
                stop()
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()


def _metadata(host: str, name: str) -> str:
    """A value of the metadata server; empty where it does not answer."""
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/{name}", headers={"Metadata-Flavor": "Google"}
    )
    # No proxy leads there.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_TIMEOUT) as answer:
            return answer.read(100).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException, ValueError):
        return ""


def _tell(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody is listening any more
        print(f"\n{text}", file=sys.__stderr__, flush=True)
