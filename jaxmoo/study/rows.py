"""The rows of a study: one JSON object per finished run, and who may add to them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmoo.config.schema import leaves
from jaxmoo.config.training import Config
from jaxmoo.config.yaml_text import flow
from jaxmoo.errors import ConfigError, DataError
from jaxmoo.files.atomic import replace_text
from jaxmoo.files.locks import Timeout, lock_of
from jaxmoo.files.outputs import typed_path
from jaxmoo.study.grid import Cell, Key

__all__ = ["Row", "RowStore", "base_row", "check_rows", "key_of", "rows_of"]

# What the runner wrote; see `jaxmoo.study.runner`.
Row = Mapping[str, Any]

_FIELDS = {"arm", "seed", "learning_rate", "settings", "languages", "data"}


def key_of(row: Row) -> Key | None:
    """Return which run of the grid a row tells of; None for the model before training."""
    if row["arm"] is None:
        return None
    return Key(row["arm"], row["seed"], row["learning_rate"])


class RowStore:
    """The file ``rows.jsonl`` of a study.

    Args:
      directory: the study's output directory; need not exist yet.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = typed_path(directory)
        self.path = self.directory / "rows.jsonl"

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Keep other processes from working on the same study.

        Raises:
          ConfigError: one already does, or the directory cannot be made.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output: {self.directory} cannot be made: {error}") from error
        lock = lock_of(self.directory / ".lock")
        try:
            lock.acquire(timeout=1)
        except Timeout as error:
            raise ConfigError(
                f"output: another process is at work on the study in {self.directory}. Wait for "
                "it, end it, or choose another directory with output=..."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def read(self) -> list[dict[str, Any]]:
        """Return all rows, in the order in which runs were finished.

        Raises:
          DataError: a line is no row, or a run has two.
        """
        if not self.path.exists():
            return []
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(self.path.read_text("utf-8", "replace").splitlines(), 1):
            where = f"{self.path}, line {number}"
            try:
                row = json.loads(line)
                missing = sorted(_FIELDS - set(row))
            # RecursionError: brackets nested by the thousand.
            except (ValueError, TypeError, RecursionError) as error:
                raise DataError(f"{where} is not a row of a study: {error}") from error
            if missing:
                raise DataError(f"{where} is not a row of a study: it lacks {', '.join(missing)}.")
            if key_of(row) in map(key_of, rows):
                raise DataError(f"{where}: there already is a row of {key_of(row) or 'the base'}.")
            rows.append(row)
        return rows

    def add(self, cells: Sequence[Cell], row: Row) -> None:
        """Add a row; a reader, or who comes after a crash, sees all of it or nothing.

        Args:
          cells: the grid.
          row: the new one.

        Raises:
          ConfigError, DataError: as `check_rows`: a row of other examples would spoil the study.
        """
        check_rows(cells, [*self.read(), row], self.path)
        old = self.path.read_text("utf-8") if self.path.exists() else ""
        replace_text(self.path, old + json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def base_row(rows: Sequence[Row]) -> Row | None:
    """Return the row of the model before training, or None."""
    return next((row for row in rows if key_of(row) is None), None)


def rows_of(cells: Sequence[Cell], rows: Sequence[Row]) -> dict[Key, Row]:
    """Return the rows of a grid that there are, in the order of the grid."""
    stored = {key_of(row): row for row in rows}
    return {cell.key: stored[cell.key] for cell in cells if cell.key in stored}


def check_rows(cells: Sequence[Cell], rows: Sequence[Row], path: Path) -> None:
    """Raise unless stored rows are of the runs that the study describes.

    Args:
      cells: the grid.
      rows: those stored.
      path: where they are from.

    Raises:
      ConfigError: a row is of other settings; names them.
      DataError: rows are of different examples, or runs of one seed saw different batches.
    """
    found = rows_of(cells, rows)
    for cell in cells:
        row = found.get(cell.key)
        if row is None:
            continue
        # A setting that came later had its default.
        stored = {name: _default(name) for name in cell.settings} | row["settings"]
        changed = [
            f"{name}: {flow(stored[name])} -> {flow(cell.settings.get(name))}"
            for name in sorted(stored)
            if stored[name] != cell.settings.get(name)
        ]
        if changed:
            raise ConfigError(
                f"{path} holds a row of {cell.key} with other settings:\n  "
                + "\n  ".join(changed)
                + "\nGo on with those settings, remove the row, or start a new study with "
                "output=..."
            )
    first = base_row(rows)
    for key, row in found.items():
        first = first or row
        other = [code for code in row["data"] if row["data"][code] != first["data"].get(code)]
        if other:
            raise DataError(
                f"{path}: the row of {key} is of other held-out examples than the first, in "
                f"{', '.join(other)}. Rows of different data cannot be compared: start a new study "
                "with output=..."
            )
    _check_paired(found, path)


def _default(name: str) -> Any:
    leaf = leaves(Config).get(name)
    return None if leaf is None else leaf.default


def _check_paired(rows: Mapping[Key, Row], path: Path) -> None:
    """Before the first update, runs of one seed on the same data have the same losses."""
    first: dict[Any, tuple[Key, Row]] = {}
    for key, row in rows.items():
        same = {k: v for k, v in row["settings"].items() if k.startswith(("data.", "model."))}
        other, like = first.setdefault((key.seed, json.dumps(same, sort_keys=True)), (key, row))
        for code, loss in row["first_loss"].items():
            if abs(loss - like["first_loss"].get(code, loss)) > 0.01 * abs(loss) + 1e-3:
                raise DataError(
                    f"{path}: {key} and {other} have different losses before their first update "
                    f"({code}: {loss:.4f}, {like['first_loss'][code]:.4f}), so they did not begin "
                    "with the same weights and batch. Remove the older rows, or start a new study "
                    "with output=..."
                )
