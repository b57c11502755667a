"""Errors that say what was expected, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class JaxmooError(Exception):
    """Base class of every error raised on purpose by jaxmoo."""


class ConfigError(JaxmooError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class DataError(JaxmooError, ValueError):
    """Training or evaluation data cannot be used as asked."""


class CheckpointError(JaxmooError, ValueError):
    """A checkpoint or weight file is missing, damaged or does not fit."""


class DownloadError(JaxmooError, OSError):
    """A file could not be fetched, or arrived damaged."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return a hint naming the choice nearest to a misspelt name.

    Args:
      name: what was given.
      choices: the valid names.

    Returns:
      ``" Did you mean 'x'?"``, or the empty string when nothing is near.

    Example:
      >>> did_you_mean("cagard", ["mgda", "cagrad"])
      " Did you mean 'cagrad'?"
      >>> did_you_mean("zzz", ["mgda", "cagrad"])
      ''
    """
    near = difflib.get_close_matches(str(name), [str(c) for c in choices], n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
