"""Memory that is not there: known before work begins, or named where it runs out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from jaxmoo.errors import ConfigError, JaxmooError
from jaxmoo.sizes import format_size

__all__ = ["MemoryFullError", "check_host_memory", "named_when_full"]


class MemoryFullError(JaxmooError):
    """The memory of a device, or of the host, has run out."""

    exit_code = 1


def check_host_memory(needed: int, what: str) -> None:
    """Raise if something is larger than all of this machine's memory.

    Args:
      needed: bytes.
      what: what needs them, and the settings that decide it.

    Raises:
      ConfigError: it is.
    """
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ConfigError(
            f"{what} takes {format_size(needed)}, and this machine has {format_size(there)}."
        )


@contextlib.contextmanager
def named_when_full(advice: str) -> Iterator[None]:
    """Turn the errors of a device, or of the host, whose memory has run out into one of ours.

    Args:
      advice: what to do.

    Raises:
      MemoryFullError: it has.
    """
    try:
        yield
    except Exception as error:
        from jax.errors import JaxRuntimeError

        if not isinstance(error, MemoryError | JaxRuntimeError):
            raise
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).split("\n")[0] or "no memory"
        raise MemoryFullError(f"memory has run out ({reason}). {advice}") from error
