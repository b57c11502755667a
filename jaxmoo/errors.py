"""Errors that say what was expected, what was found and what to do, and how a command ends."""

from __future__ import annotations

import difflib
import signal
import sys
from collections.abc import Iterable


class JaxmooError(Exception):
    """Base class of every error raised on purpose by jaxmoo.

    Attributes:
      exit_code: of a command that it ends; 2 where nothing was begun for it.
    """

    exit_code = 2


class ConfigError(JaxmooError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class DataError(JaxmooError, ValueError):
    """Training or evaluation data cannot be used as asked."""


class CheckpointError(JaxmooError, ValueError):
    """A checkpoint or weight file is missing, damaged or does not fit."""


class DamagedError(CheckpointError):
    """Files of a checkpoint or model are not what was written."""


class DownloadError(JaxmooError, OSError):
    """A file could not be fetched, or arrived damaged."""


class InterruptedRunError(JaxmooError):
    """The run was asked to stop; it saved what it had and can be resumed.

    Attributes:
      signal: what asked it.
    """

    def __init__(self, message: str, number: signal.Signals) -> None:
        super().__init__(message)
        self.signal = number
        self.exit_code = 128 + number


def failed(error: JaxmooError | OSError, where: str = "") -> int:
    """Print an error that ends a command.

    Args:
      error: one of ours, or of the system's: a full disk, most often.
      where: which part of the command it is of.

    Returns:
      The command's exit code.
    """
    print(f"error{where}: {error}", file=sys.stderr)
    return error.exit_code if isinstance(error, JaxmooError) else 1


def shown(value: object, most: int = 80) -> str:
    """Return a value as an error shows it: as Python writes it, cut where that is long.

    Args:
      value: what was found; it may come from a file that means harm.
      most: characters at most.

    Example:
      >>> shown("nan"), shown([1] * 1000, most=9), shown(10**5000)
      ("'nan'", '[1, 1, 1,...', 'an integer of more than 4300 digits')
    """
    try:
        text = repr(value[: most + 1] if isinstance(value, str) else value)
    except ValueError:  # Python does not write integers beyond a number of digits
        return f"an integer of more than {sys.get_int_max_str_digits()} digits"
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply to be shown"
    return text if len(text) <= most else f"{text[:most]}..."


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
    near = difflib.get_close_matches(str(name)[:200], [str(c) for c in choices], n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
