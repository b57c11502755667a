"""Output for people that never decides about the work: whatever the terminal is, or was."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

__all__ = ["forgiving_output"]

# Our own signs, as a terminal shows them that knows no other letters than English ones.
_PLAIN = str.maketrans({"→": "->", "±": "+-", "–": "-", "⟦": "[[", "⟧": "]]", "“": '"', "”": '"'})


class _Forgiving:
    """A stream that takes every text: what it cannot show it spells, what it cannot write is lost.

    Args:
      stream: the stream that it stands for.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError as error:
            encoding = error.encoding
            spelt = text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)
            return self.write(spelt)
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self) -> None:
        """Send what is still to be written to nowhere; Python writes it at the end, or fails."""
        with contextlib.suppress(OSError, ValueError):
            number = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


@contextlib.contextmanager
def _forgiving_streams() -> Iterator[None]:
    # A file that is opened later would get a number that is free, and what libraries write there.
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout, sys.stderr = (_Forgiving(nowhere if s is None else s) for s in before)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before


def forgiving_output(main: Callable[..., int]) -> Callable[..., int]:
    """Let a command end as its work does, whatever becomes of its output.

    Letters that the output's encoding lacks are spelt (``→`` as ``->``, others as ``\\u4f60``);
    what is written to a closed pipe, a full disk or a stream that is closed is lost.

    Args:
      main: the command.

    Example:
      >>> forgiving_output(lambda: print("done") or 0)()
      done
      0
    """

    @functools.wraps(main)
    def command(*arguments: Any, **options: Any) -> int:
        with _forgiving_streams():
            return main(*arguments, **options)

    return command
