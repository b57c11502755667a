"""What all commands have in common: how they show what they have to say, and how they end."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import ParamSpec

from jaxmoo.errors import ConfigError, InterruptedRunError, JaxmooError, failed
from jaxmoo.runtime.terminal import forgiving_output

__all__ = ["add_settings", "command", "pairs"]

P = ParamSpec("P")


def command(stopped: str = "Stopped.") -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Make a function a command: its errors become a line and an exit code.

    Args:
      stopped: what is said when the user stops it with Ctrl-C.

    Returns:
      A decorator of functions that return an exit code: 0 where all went well. The command's is
      theirs, or 2 for bad input, for which nothing was begun; 1 for what failed along the way, such
      as a full disk; 128 + N when signal N stopped it, 130 for Ctrl-C.

    Example:
      >>> @command()
      ... def main() -> int:
      ...     raise OSError("no space left")
      >>> main()
      1
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @forgiving_output
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                return main(*args, **kwargs)
            except InterruptedRunError as error:
                print(error, file=sys.stderr)
                return error.exit_code
            except (JaxmooError, OSError) as error:
                return failed(error)
            except KeyboardInterrupt:
                print(stopped, file=sys.stderr)
                return 130

        return run

    return decorate


def add_settings(parser: argparse.ArgumentParser, whose: str) -> None:
    """Let a command take settings: a file of them, and others that win.

    Args:
      parser: the command's.
      whose: what the settings are of, for the help.
    """
    parser.add_argument(
        "--config",
        required=True,
        help=f"YAML file with the {whose}'s settings, or the name of an example (`jaxmoo configs`)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="other settings")


def pairs(option: str, given: Sequence[str] | None) -> dict[str, str] | None:
    """Read what an option that takes ``KEY=NAME`` was given; None where it was not given.

    Args:
      option: what it is called, for the error.
      given: its arguments.

    Raises:
      ConfigError: one of them is no such pair.

    Example:
      >>> pairs("--codes", ["pt=por_Latn", "en=eng_Latn"])
      {'pt': 'por_Latn', 'en': 'eng_Latn'}
    """
    if given is None:
        return None
    divided = [text.partition("=") for text in given]
    for text, parts in zip(given, divided, strict=True):
        if not all(parts):
            raise ConfigError(f"{option} takes KEY=NAME, such as en=eng; found {text!r}.")
    return {key: name for key, _, name in divided}
