"""How far a run has come: a bar on a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from jaxmoo.runtime.watching import QUIET, Heartbeat, clock_time, interval

__all__ = ["Progress"]

_REDRAWN = 5.0  # seconds between two drawings of a bar during a long step


class _Bar(tqdm):
    """A bar with a time left of its own."""

    left = "?"

    @property
    def format_dict(self) -> dict[str, Any]:
        return {**super().format_dict, "left": self.left}


class Progress:
    """Shows a run's progress: on a terminal as a bar over a line of per-language losses.

    Where the output is not a terminal (a log file, a batch job) it writes a plain line, with date
    and time, every few steps instead, and whenever a minute has passed without one. The time left
    is that of the steps to come: the first one, which is compiled, does not count.

    Args:
      steps: steps of the whole run.
      start: steps already done when a run is resumed.
      every: steps between the lines where there is no terminal.
      quiet: seconds without a line there after which one says what is going on.
      doing: gives what is going on beside steps, such as ``"checkpoint"``, or nothing.
      file: where to; standard error by default.
    """

    def __init__(
        self,
        steps: int,
        *,
        start: int = 0,
        every: int = 10,
        quiet: float = QUIET,
        doing: Callable[[], str] = lambda: "",
        file: TextIO | None = None,
    ):
        self._file = sys.stderr if file is None else file
        self._steps, self._every, self._doing = steps, every, doing
        self._start, self._begun = start, time.monotonic()
        self._step, self._first = start, 0.0  # when the first step was done
        self._moved = self._begun  # when the last one was
        self._bar = self._losses = None
        self._width = 80
        if self._file.isatty():
            layout = "{percentage:3.0f}% |{bar}| {n}/{total} [{elapsed}<{left}]  {desc}"
            common = {"file": self._file, "dynamic_ncols": True, "miniters": 1}
            self._bar = _Bar(total=steps, initial=start, bar_format=layout, **common)
            self._losses = tqdm(total=0, position=1, bar_format="{desc}", **common)
        self._heartbeat = Heartbeat(
            self._beat, quiet if self._bar is None else min(_REDRAWN, quiet)
        )

    def update(self, row: Mapping[str, Any]) -> None:
        """Show a training row; its ``step`` counts the steps done."""
        step = self._step = int(row["step"])
        self._moved = time.monotonic()
        if step <= self._start + 1:
            self._first = time.monotonic()
        losses = {
            code: math.nan if loss is None else float(np.asarray(loss, np.float64))
            for code, loss in row.get("loss", {}).items()
        }
        summary = _summary(row, losses)
        if self._bar is not None and self._losses is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self._width = os.get_terminal_size(self._file.fileno()).columns or 80  # 0: unknown
            self._losses.set_description_str(_compact(losses, self._width - 1), refresh=False)
            self._bar.set_description_str(summary, refresh=False)
            self._bar.left = self._left()
            if self._bar.update(step - self._bar.n):
                self._losses.refresh()
        elif step % self._every == 0 or step in (self._start + 1, self._steps):
            self._print(f"{self._where()}  {summary}  | {_compact(losses)}")

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            tqdm.write(text, file=self._file)
        else:
            self._print(text)

    def close(self) -> None:
        """Leave the bar as it is and let other output follow."""
        for bar in (self._bar, self._losses):
            if bar is not None:
                bar.close()

    def _where(self) -> str:
        elapsed = interval(time.monotonic() - self._begun)
        return f"step {self._step}/{self._steps} [{elapsed}<{self._left()}]"

    def _left(self) -> str:
        """The time of the steps to come, from that of those since the first."""
        timed = self._step - self._start - 1
        if self._step >= self._steps:
            return interval(0)
        if timed < 1:
            return "?"
        return interval((time.monotonic() - self._first) / timed * (self._steps - self._step))

    def _beat(self, quiet: float) -> None:
        doing = self._doing()
        if self._bar is not None:
            self._bar.refresh()
        elif doing != "evaluate":  # which shows by itself how far it has come
            now = doing or ("a step" if self._step > self._start else "the first step, compiled")
            since = min(quiet, time.monotonic() - self._moved)
            self._print(f"{self._where()}  {now}, under way for {interval(since)}", beat=True)

    def _print(self, text: str, *, beat: bool = False) -> None:
        if not beat:
            self._heartbeat.heard()
        print(f"{clock_time()}  {text}", file=self._file, flush=True)

    def __enter__(self) -> Progress:
        self._heartbeat.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._heartbeat.__exit__()
        self.close()


def _summary(row: Mapping[str, Any], losses: Mapping[str, float]) -> str:
    parts = []
    if losses:
        worst = max(losses, key=lambda code: (math.isnan(losses[code]), losses[code]))
        parts.append(f"loss {sum(losses.values()) / len(losses):.3f}")
        if len(losses) > 1:
            parts.append(f"worst {worst} {losses[worst]:.3f}")
    if row.get("epochs"):
        epochs = row["epochs"].values()
        ends = dict.fromkeys(f"{x:.1f}" for x in (min(epochs), max(epochs)))
        parts.append(f"epoch {' to '.join(ends)}")
    if row.get("conflict_share") is not None:
        parts.append(f"conflict {100 * row['conflict_share']:.0f}%")
    if row.get("tokens_per_second") is not None:
        parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
    return "  ".join(parts)


def _compact(losses: Mapping[str, float], width: int | None = None) -> str:
    """Losses in one line; those of the highest loss where not all of them fit."""
    entries = [f"{code} {loss:.2f}" for code, loss in losses.items()]
    if width is None or len("  ".join(entries)) <= width:
        return "  ".join(entries)
    worst = sorted(losses, key=lambda code: (math.isnan(losses[code]), losses[code]), reverse=True)
    line = ""
    for code in worst:
        entry = f"{code} {losses[code]:.2f}  "
        if len(line) + len(entry) + len("...") > width:
            break
        line += entry
    return line + "..."
