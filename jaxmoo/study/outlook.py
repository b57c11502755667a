"""What a study will cost, before it is run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from jaxmoo.config.training import Config
from jaxmoo.data.table import text_table
from jaxmoo.errors import ConfigError
from jaxmoo.hf import load_config as load_model_config
from jaxmoo.hf import resolve_source
from jaxmoo.models import Decoder, DecoderConfig
from jaxmoo.runs.trained_parameters import run_segments, split_model
from jaxmoo.study.grid import Cell
from jaxmoo.study.rows import Row, key_of, rows_of
from jaxmoo.train.planning import shape_of
from jaxmoo.train.throughput import model_flops

__all__ = ["outlook"]


def outlook(cells: Sequence[Cell], rows: Sequence[Row]) -> str:
    """Describe how many runs there are, how many are done and what is left to do.

    Args:
      cells: the grid.
      rows: those stored. Time is estimated from theirs.

    Returns:
      A table per arm, and sums. FLOPs are those of training, as `jaxmoo.train.throughput` counts
      them.
    """
    done = rows_of(cells, rows)
    took = {key: row["train_seconds"] + row["measure_seconds"] for key, row in done.items()}
    arms = list(dict.fromkeys(cell.key.arm for cell in cells))
    table, left, flops_left, known = [], 0.0, 0.0, bool(took)
    of_step: dict[str, float] = {}  # by what decides it: arms seldom differ in that
    for arm in arms:
        mine = [cell for cell in cells if cell.key.arm == arm]
        config = mine[0].config
        what = str((config.model, config.lora, _positions(config), config.data.sequence_length))
        if what not in of_step:
            of_step[what] = _flops(config)
        steps, flops = config.train.steps, config.train.steps * of_step[what]
        positions = (
            config.data.step_languages * config.data.batch_size * config.data.sequence_length
        )
        missing = sum(cell.key not in done for cell in mine)
        own = [seconds for key, seconds in took.items() if key.arm == arm] or list(took.values())
        flops_left += missing * flops
        left += missing * (statistics.fmean(own) if own else 0)
        table.append(
            [
                arm,
                len(mine),
                len(mine) - missing,
                steps,
                f"{positions:,}",
                f"{flops / 1e12:,.1f}",
                f"{statistics.fmean(own) / 60:.1f}" if own else "?",
            ]
        )
    header = ["arm", "runs", "done", "steps", "positions per run", "TFLOP per run", "min per run"]
    missing = len(cells) - len(done)
    time = f"about {left / 3600:.1f} hours as finished runs took" if known else "time unknown yet"
    base = "" if any(key_of(row) is None for row in rows) else " and a look at the base model"
    return (
        f"{text_table(header, table)}\n\n"
        f"{len(cells)} runs, {len(done)} done, {missing} to do{base}; "
        f"{flops_left / 1e12:,.0f} TFLOP of training; {time}."
    )


def _flops(config: Config) -> float:
    """Model FLOPs of a step."""
    data, architecture = config.data, _architecture(config.model.source)
    segments = run_segments(config, architecture)
    _, params, frozen = split_model(config, Decoder.abstract(architecture, segments=segments))
    return model_flops(architecture, params, frozen, _positions(config), data.sequence_length)


def _positions(config: Config) -> int:
    """Tokens of a step, padding included."""
    data = config.data
    return data.step_languages * data.batch_size * data.sequence_length


def _architecture(source: str) -> DecoderConfig:
    try:
        return shape_of(source)
    except ConfigError:  # not a model of a known shape
        return load_model_config(resolve_source(source))
