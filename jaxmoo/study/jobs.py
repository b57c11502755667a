"""A study in several processes at once: they share the device, and one of them writes the rows."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from jaxmoo.config.study_config import StudyConfig
from jaxmoo.errors import InterruptedRunError, JaxmooError
from jaxmoo.study.grid import Cell
from jaxmoo.study.outcome import planned
from jaxmoo.study.rows import Row, RowStore, check_rows, rows_of

__all__ = ["run_side_by_side"]


def run_side_by_side(
    study: StudyConfig,
    cells: Sequence[Cell],
    jobs: int,
    *,
    say: Callable[[str], None] = print,
) -> None:
    """Run what has no row yet in several processes, each of which takes some of the arms.

    A process compiles an arm's step once, for all its seeds and learning rates. An arm that fails
    does not stop the others.

    Args:
      study: the settings.
      cells: the grid.
      jobs: the number of processes.
      say: called with lines for a person to read.

    Raises:
      JaxmooError: an arm failed, or stored rows are not of this study.
    """
    store = RowStore(study.output)
    # All processes take from one device what they need, rather than most of it beforehand.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    context = multiprocessing.get_context("spawn")
    with store.claim(), _ended_by_signals():
        rows = store.read()
        check_rows(cells, rows, store.path)
        found = rows_of(cells, rows)
        missing = (cell for cell in planned(study, cells, found) if cell.key not in found)
        arms = list(dict.fromkeys(cell.key.arm for cell in missing))
        workers: list[tuple[Connection, BaseProcess]] = []
        try:
            for share in (arms[number::jobs] for number in range(min(jobs, len(arms)))):
                messages, sent = context.Pipe(duplex=False)
                worker = context.Process(
                    target=_work,
                    args=(study, [c for c in cells if c.key.arm in share], rows, sent),
                    kwargs={"base": not workers},
                    name=", ".join(share),
                    daemon=True,
                )
                worker.start()
                sent.close()  # so that the messages end with the process, however it ends
                workers.append((messages, worker))
            errors = []
            for kind, content in _received(workers):
                if kind == "row":
                    store.add(cells, content)
                elif kind == "line":
                    say(content)
                else:
                    say(f"Failed: {content}")
                    errors.append(content)
        finally:
            for _, worker in workers:
                worker.terminate()
            for _, worker in workers:
                worker.join(timeout=30)
                worker.kill()
        if errors:
            raise JaxmooError("\n".join(errors))


def _work(
    study: StudyConfig, cells: list[Cell], rows: list[Row], messages: Connection, *, base: bool
) -> None:
    """What a process does."""
    from jaxmoo.study.runner import run_cells  # in whose process JAX takes the device

    def failed(cell: Cell, error: JaxmooError) -> None:
        messages.send(("error", f"{cell.key}: {error}"))

    # Whoever stops this process says so; a broken pipe means that nobody writes its rows any more.
    with contextlib.suppress(InterruptedRunError, KeyboardInterrupt, BrokenPipeError):
        run_cells(
            study,
            cells,
            rows,
            lambda row: messages.send(("row", row)),
            base=base,
            failed=failed,
            say=lambda line: messages.send(("line", line)),
        )


def _received(workers: Sequence[tuple[Connection, BaseProcess]]) -> Iterator[tuple[str, Any]]:
    """What processes say, until all have ended, and which of them ended before they were done."""
    left = dict(workers)
    while left:
        for messages in wait(list(left)):
            assert isinstance(messages, Connection)
            try:
                message = messages.recv()
            except (EOFError, OSError):
                worker = left.pop(messages)
                worker.join()
                if worker.exitcode:
                    yield (
                        "error",
                        f"{worker.name}: the process of these arms ended with exit code "
                        f"{worker.exitcode}. Its finished runs are stored; the same command goes "
                        "on with the others.",
                    )
                continue
            yield message


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C, so that no process is left behind."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
