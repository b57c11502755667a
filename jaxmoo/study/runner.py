"""Running the cells of a study: each one is trained, measured, and becomes a row."""

from __future__ import annotations

import dataclasses
import gc
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxmoo.config.study_config import StudyConfig
from jaxmoo.config.training import Config, dated
from jaxmoo.errors import DataError
from jaxmoo.evaluate.evaluation import Evaluation, evaluate
from jaxmoo.evaluate.measures import MEASURES, measured, score
from jaxmoo.evaluate.results import LanguageResult, read_results
from jaxmoo.hf import resolve_source
from jaxmoo.runs.provenance import versions
from jaxmoo.runtime.compiled import kept_programs
from jaxmoo.study.examples import PARTS, members, pack_examples, reported_part
from jaxmoo.study.grid import Cell
from jaxmoo.study.outcome import summary
from jaxmoo.study.rows import RowStore, base_row, check_rows, rows_of
from jaxmoo.train.metrics import read_metrics
from jaxmoo.train.run import train

__all__ = ["run_missing"]


def run_missing(
    study: StudyConfig,
    cells: Sequence[Cell],
    *,
    max_runs: int | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Run what has no row yet, in the order of the grid.

    A run that was interrupted goes on from its last checkpoint.

    Args:
      study: the settings.
      cells: the grid.
      max_runs: end after so many runs; None for all.
      say: called with lines for a person to read.

    Returns:
      How many runs are still missing.

    Raises:
      JaxmooError: a run cannot be done, or stored rows are not of this study.
      InterruptedRunError: when asked to stop; the run at hand is saved.
    """
    store = RowStore(study.output)
    with store.claim(), kept_programs(store.directory.absolute() / ".compiled"):
        rows = store.read()
        check_rows(cells, rows, store.path)
        missing = [cell for cell in cells if cell.key not in rows_of(cells, rows)]
        if missing and base_row(rows) is None:
            say("Measuring the model before training ...")
            store.append(_measure_base(study, missing[0].config, store.directory / "base"))
            rows = store.read()
        for number, cell in enumerate(missing[:max_runs], 1):
            say(f"Run {number} of {len(missing)}: {cell.key} ...")
            row = _run(study, _on_day(cell, rows))
            # Before it is stored: a row of other examples would spoil the study.
            check_rows(cells, [*rows, row], store.path)
            store.append(row)
            rows.append(row)
            if not study.keep_runs:
                shutil.rmtree(cell.config.output)
            say(f"  {_line(row)}")
    return max(0, len(missing) - (len(missing) if max_runs is None else max_runs))


def _on_day(cell: Cell, rows: Sequence[dict[str, Any]]) -> Cell:
    """A run on the date with which its study began, for chat templates that read the clock."""
    date = next((row["date"] for row in rows if row.get("date")), None)
    return dataclasses.replace(cell, config=dated(cell.config, date))


def _run(study: StudyConfig, cell: Cell) -> dict[str, Any]:
    begun = time.perf_counter()
    directory = Path(cell.config.output)
    results = train(cell.config, _silent)
    trained = time.perf_counter()
    found = _measure(study, cell.config, directory, directory / "study.json", step=results["steps"])
    steps = [row for row in read_metrics(directory) if row.get("loss")]
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
        "train_seconds": trained - begun,
        "measure_seconds": time.perf_counter() - trained,
        "versions": versions(),
        "hardware": _hardware(),
    }
    # What this run compiled and held is of no use to the next one.
    jax.clear_caches()
    gc.collect()
    return row


def _measure_base(study: StudyConfig, config: Config, directory: Path) -> dict[str, Any]:
    source = resolve_source(config.model.source)
    found = _measure(study, config, source, directory / "base.json", step=None)
    shutil.rmtree(directory)
    row = {"arm": None, "seed": None, "learning_rate": None, "settings": {}, **found}
    return row | {"versions": versions(), "hardware": _hardware()}


def _measure(
    study: StudyConfig, config: Config, model: Path, output: Path, *, step: int | None
) -> dict[str, Any]:
    """Scores of every language on every part of its held-out examples."""
    data = config.data
    evaluate(
        Evaluation(
            name=model.name,
            model=model,
            output=output,
            data=data,
            seen=data.seen,
            unseen=data.unseen,
            held_out=True,
            step=step,
            choices=study.measure.choices,
            max_examples=study.measure.max_examples,
            batch_size=study.measure.batch_size,
            dtype=config.model.dtype,
            skip_empty=True,
        ),
        _silent,
    )
    results = read_results(output)
    return {
        "seen": data.seen,
        "unseen": data.unseen,
        "data": {code: one.data for code, one in results.languages.items()},
        "languages": {
            code: _parts(code, one, study.tune) for code, one in results.languages.items()
        },
        "examples": pack_examples(
            results.languages,
            reported_part(study.learning_rates),
            study.tune,
            base=step is None,
        ),
        **({"date": results.date} if results.date else {}),
    }


def _parts(code: str, result: LanguageResult, tune: float) -> dict[str, dict[str, float]]:
    found = {}
    for part in PARTS:
        kept = members(result.units, part, tune)
        if not kept:
            raise DataError(
                f"Language {code!r}: none of {len(result.units)} held-out examples falls into the "
                f"part {part!r}. Hold out more (data.held_out, measure.max_examples)."
            )
        columns = {name: [values[i] for i in kept] for name, values in result.columns.items()}
        scores = {name: score(columns, name) for name in measured(columns)}
        found[part] = {"examples": len(kept), **scores}
    return found


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


def _line(row: dict[str, Any]) -> str:
    means = summary(row, "all")
    parts = [f"{MEASURES[name].label} {one['seen']:.3f}" for name, one in means.items()]
    seconds = "trained in {train_seconds:.0f} s, measured in {measure_seconds:.0f} s"
    return f"seen mean: {', '.join(parts)}; {seconds.format(**row)}"


def _hardware() -> str:
    devices = jax.devices()
    return (
        f"{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} CPU cores "
        f"({platform.machine()})"
    )


def _silent(line: str) -> None:
    """What single runs say is left out: the study tells the outcome."""
