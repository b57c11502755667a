"""Running the cells of a study: each one is trained, measured, and becomes a row."""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxmoo.config.study_config import StudyConfig
from jaxmoo.config.training import Config, dated
from jaxmoo.errors import InterruptedRunError, JaxmooError
from jaxmoo.evaluate.measures import MEASURES
from jaxmoo.files.outputs import typed_path
from jaxmoo.files.scratch import scratch_of
from jaxmoo.hf.directory import remove_directory
from jaxmoo.runs.provenance import versions
from jaxmoo.runtime.compiled import kept_programs
from jaxmoo.study.grid import Cell
from jaxmoo.study.measure import measure
from jaxmoo.study.outcome import planned, summary
from jaxmoo.study.rows import Row, RowStore, base_row, check_rows, rows_of
from jaxmoo.train.kept import Kept
from jaxmoo.train.metrics import read_metrics
from jaxmoo.train.run import train
from jaxmoo.train.setup import make_run_mesh, prepare

__all__ = ["left_of", "run_cells", "run_missing"]


def run_missing(
    study: StudyConfig,
    cells: Sequence[Cell],
    *,
    max_runs: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Run what has no row yet, in the order of the grid.

    A run that was interrupted goes on from its last checkpoint.

    Args:
      study: the settings.
      cells: the grid.
      max_runs: end after so many runs; None for all.
      say: called with lines for a person to read.

    Raises:
      JaxmooError: a run cannot be done, or stored rows are not of this study.
      InterruptedRunError: when asked to stop; the run at hand is saved.
    """
    store = RowStore(study.output)
    with store.claim():
        rows = store.read()
        check_rows(cells, rows, store.path)
        keep = functools.partial(store.add, cells)
        run_cells(study, cells, rows, keep, max_runs=max_runs, say=say)


def left_of(study: StudyConfig, cells: Sequence[Cell], rows: Sequence[Row]) -> int:
    """Return how many runs of a grid have no row yet."""
    found = rows_of(cells, rows)
    return sum(cell.key not in found for cell in planned(study, cells, found))


def run_cells(
    study: StudyConfig,
    cells: Sequence[Cell],
    rows: Sequence[Row],
    keep: Callable[[dict[str, Any]], None],
    *,
    max_runs: int | None = None,
    base: bool = True,
    failed: Callable[[Cell, JaxmooError], None] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Run what has no row yet, in the order of the grid, in this process.

    Data, weights and compiled programs are made once, for all the runs that they suit.

    Args:
      study: the settings.
      cells: the grid, or some of its arms.
      rows: those there are.
      keep: given every new row.
      max_runs: end after so many runs; None for all.
      base: measure the model before training, if there is no row of it.
      failed: told of a run that cannot be done, whose arm is then left; None raises its error.
      say: called with lines for a person to read.

    Raises:
      JaxmooError: a run cannot be done.
      InterruptedRunError: when asked to stop; the run at hand is saved.
    """
    rows, kept = list(rows), Kept()
    left_out: set[str] = set()

    def todo() -> list[Cell]:
        found = rows_of(cells, rows)
        return [
            cell
            for cell in planned(study, cells, found, known=True)
            if cell.key not in found and cell.key.arm not in left_out
        ]

    def take(row: dict[str, Any]) -> None:
        keep(row)
        rows.append(row)

    with kept_programs(scratch_of(RowStore(study.output).directory.absolute()) / ".compiled"):
        done = 0
        while (missing := todo()) and (max_runs is None or done < max_runs):
            cell = _on_day(missing[0], rows)
            try:
                if base and base_row(rows) is None:
                    say("Measuring the model before training ...")
                    take(_measure_base(study, cell, kept))
                more = left_of(study, cells, rows)
                say(f"Run {done + 1} of {done + more}: {cell.key} ...")
                row = _run(study, _on_day(cell, rows), kept)
            except InterruptedRunError:
                raise
            except JaxmooError as error:
                if failed is None:
                    raise
                failed(cell, error)
                left_out.add(cell.key.arm)
                continue
            take(row)
            done += 1
            if not study.keep_runs:
                output = typed_path(cell.config.output)
                for place in (output, scratch_of(output)):  # two for a bucket only
                    remove_directory(place)
            say(f"  {_line(row)}")


def _on_day(cell: Cell, rows: Sequence[Row]) -> Cell:
    """A run on the date with which its study began, for chat templates that read the clock."""
    date = next((row["date"] for row in rows if row.get("date")), None)
    return dataclasses.replace(cell, config=dated(cell.config, date))


def _run(study: StudyConfig, cell: Cell, kept: Kept) -> dict[str, Any]:
    begun = time.perf_counter()
    found: dict[str, Any] = {}
    took = 0.0

    def ask(setup: Any, params: Any) -> None:
        nonlocal took
        began = time.perf_counter()
        found.update(measure(study, cell.config, setup, params, kept))
        took = time.perf_counter() - began

    results = train(cell.config, _silent, kept=kept, measure=ask)
    steps = [row for row in read_metrics(cell.config.output) if row.get("loss")]
    row = {
        "arm": cell.key.arm,
        "seed": cell.key.seed,
        "learning_rate": cell.key.learning_rate,
        "settings": cell.settings,
        **found,
        "steps": results["steps"],
        "tokens": sum(step["tokens"] for step in steps),
        "first_loss": steps[0]["loss"],
        "conflict_share": _mean([step["conflict_share"] for step in steps]),
        "update_norm": _mean([step["grad_norm"] for step in steps]),
        "norm_ratio": _mean([_norm_ratio(step) for step in steps]),
        # The first step compiles.
        "step_seconds": statistics.median([s["step_seconds"] for s in steps[1:] or steps]),
        "train_seconds": time.perf_counter() - begun - took,
        "measure_seconds": took,
        "versions": versions(),
        "hardware": _hardware(cell.config),
    }
    gc.collect()  # what this run held is of no use to the next one
    return row


def _measure_base(study: StudyConfig, cell: Cell, kept: Kept) -> dict[str, Any]:
    setup = prepare(cell.config, _silent, kept=kept)
    config = dated(cell.config, setup.date)
    found = measure(study, config, setup, setup.state.params, kept, base=True)
    row = {"arm": None, "seed": None, "learning_rate": None, "settings": {}, **found}
    return row | {"versions": versions(), "hardware": _hardware(config)}


def _norm_ratio(step: dict[str, Any]) -> float | None:
    """Length of the resolved gradient over that of the mean gradient."""
    blocks = step.get("blocks")
    if not blocks:
        return None
    update, mean = (
        sum(block[name] ** 2 for block in blocks.values()) ** 0.5
        for name in ("update_norm", "mean_norm")
    )
    return update / mean if mean > 0 else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _line(row: Row) -> str:
    means = summary(row, "all")
    parts = [f"{MEASURES[name].label} {one['seen']:.3f}" for name, one in means.items()]
    seconds = "trained in {train_seconds:.1f} s, measured in {measure_seconds:.1f} s"
    return f"seen mean: {', '.join(parts)}; {seconds.format(**row)}"


def _hardware(config: Config) -> str:
    devices = make_run_mesh(config).devices.ravel()
    return (
        f"{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} CPU cores "
        f"({platform.machine()})"
    )


def _silent(line: str) -> None:
    """What single runs say is left out: the study tells the outcome."""
