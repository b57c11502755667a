"""What a run writes down while it goes: metrics.jsonl, and rows for trackers.

A *row* is a mapping with an integer ``step`` and any of these, as far as they are known then::

    {"step": 12, "time": "2026-11-28T03:13:41+00:00",
     "loss": {"en": 2.31, ...},             # mean per target token, before the step's update; of
                                            # the languages of the step
     "mean_loss": 2.4,                      # mean over them
     "epochs": {"en": 0.4, ...},            # passes over each language's examples so far
     "malformed": {"en": 0, ...},           # of streams: records left out so far
     "learning_rate": 5e-5, "grad_norm": 0.8, "step_seconds": 1.9, "tokens_per_second": 2100.0,
     "conflict_share": 0.31,                # pairs of languages with opposed gradients, all blocks
     "weights": {"en": 0.11, ...},          # mean over blocks
     "loss_weights": {"en": 1.2, ...},      # what resolve.weighting multiplied losses by
     "gram_error": 0.02,                    # of sketched Gram matrices, relative; mean over blocks
     "cosine": [[1.0, ...], ...],           # between the languages' gradients, mean over blocks
     "skipped": {"en": 0, ...},             # steps so far in which it was not finite somewhere
     "tokens": 4100, "language_tokens": {"en": 512, ...},  # of the step, without padding
     "language_norm": {"en": 1.3, ...},     # of its gradient, all blocks
     "language_conflict": {"en": 0.4, ...}, # share of the others whose gradient opposes its own
     "seconds": {"data": 0.01, ...},        # of the host since the last row, beside the devices
     "goodput": 0.93,                       # share of the run's time spent in training steps
     "mfu": 0.41,                           # see jaxmoo.train.throughput
     "device_memory_peak": 30e9,            # bytes, of the first device
     "blocks": {"layers.22": {"conflict_share": 0.29, "update_norm": 0.1}, ...}}

or, where the run was evaluated, from step 0 to the last one::

    {"step": 12, "time": "2026-11-28T03:13:41+00:00",
     "held_out": {"en": 2.1, ...}}          # mean negative log-likelihood per token
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoo.errors import DataError
from jaxmoo.files.appended import Appended
from jaxmoo.files.atomic import replace_text
from jaxmoo.files.buckets import hide_secrets
from jaxmoo.files.outputs import typed_path
from jaxmoo.train.trackers import Tracker, Trackers, open_trackers

__all__ = ["MetricsWriter", "read_metrics"]


_NONE = Trackers()


class MetricsWriter:
    """Appends rows to ``metrics.jsonl`` and sends their numbers to trackers.

    Every row is on disk when :meth:`write` returns. A resumed run goes on behind the rows up to
    its checkpoint; those an interrupted run wrote after it are removed first, in one step, so
    that no row occurs twice. A tracker that fails is told of and left; the run goes on.

    Args:
      directory: the run's directory; made if need be.
      trackers: which trackers numbers are sent to.
      resume_step: last step whose rows are kept; None starts afresh.
      settings: of the run, for the trackers.

    Raises:
      ConfigError: a tracker cannot be used; see :func:`jaxmoo.train.trackers.open_trackers`.
      DataError: the rows that are there cannot be read.
    """

    def __init__(
        self,
        directory: str | Path,
        trackers: Trackers = _NONE,
        *,
        resume_step: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        directory = typed_path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        first_step = 0 if resume_step is None else resume_step + 1
        self._trackers = open_trackers(
            directory, trackers, first_step=first_step, settings=settings
        )
        _keep_until(self.path, resume_step)
        self._file = Appended(self.path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row; values may be numbers, NumPy or JAX arrays, mappings and lists."""
        plain = _plain(row)
        if not isinstance(plain.get("step"), int):
            raise DataError(f"A row of metrics needs an integer step, found {plain.get('step')!r}.")
        self._file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
        values = dict(_scalars(plain))
        for tracker in list(self._trackers):
            with self._left_if_it_fails(tracker):
                tracker.log(values, plain["step"])

    def close(self) -> None:
        """Close the files.

        Raises:
          OSError: rows did not get to a bucket.
        """
        try:
            self._file.close()
        finally:
            for tracker in list(self._trackers):
                with self._left_if_it_fails(tracker):
                    tracker.close()

    @contextlib.contextmanager
    def _left_if_it_fails(self, tracker: Tracker) -> Iterator[None]:
        """Go on without a tracker whose server is gone; the numbers are in the file."""
        try:
            yield
        except Exception as error:
            self._trackers.remove(tracker)
            name = type(tracker).__name__.strip("_")
            why = hide_secrets(str(error))  # a server's address may hold who logs in, and how
            print(f"Note: {name} gets no more metrics: {why}", file=sys.stderr, flush=True)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except OSError:
            if kind is None:  # else the error says what went wrong first, and what to do
                raise


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file.

    A last line that a killed run left incomplete is ignored.

    Args:
      path: ``metrics.jsonl``, or the directory it lies in.

    Returns:
      The rows; what was not a finite number is None.

    Raises:
      DataError: another line is not a row.
    """
    path = typed_path(path)
    if path.is_dir():
        path /= "metrics.jsonl"
    return [row for _, row in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no integer step")
        except (ValueError, RecursionError) as error:
            if not line.endswith("\n"):
                return
            raise DataError(
                f"{path}:{number}: expected one JSON object with a step per line, found "
                f"{line.strip()[:60]!r} ({error})."
            ) from error
        yield line.rstrip("\n") + "\n", row


def _keep_until(path: Path, step: int | None) -> None:
    """Cut a metrics file behind a step; the old file stays until the new one is complete."""
    if not path.exists():
        return
    # A run that goes on begins with the evaluation of its step, and writes that row anew.
    kept = [
        line
        for line, row in _lines(path)
        if step is not None
        and row["step"] <= step
        and ("held_out" not in row or row["step"] < step)
    ]
    replace_text(path, "".join(kept))


def _plain(value: Any) -> Any:
    """Turn a value into what JSON holds. Numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    array = np.asarray(value)
    if array.ndim:
        return [_plain(item) for item in array]
    if array.dtype == bool or np.issubdtype(array.dtype, np.integer):
        return array.item()
    # Through text: the shortest decimal that is this float32, not its expansion to 17 digits.
    number = float(str(array.astype(np.float64 if array.dtype == np.float64 else np.float32)))
    return number if math.isfinite(number) else None


def _scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield TensorBoard tags, one chart group per quantity, and values of a plain row."""
    for key, value in row.items():
        if key == "step":
            continue
        if key == "blocks":
            for block, quantities in value.items():
                for name, number in quantities.items():
                    yield f"block_{name}/{block}", _number(number)
        elif isinstance(value, Mapping):
            yield from ((f"{key}/{name}", _number(item)) for name, item in _flat(value))
        elif value is None or isinstance(value, int | float):
            yield f"train/{key}", _number(value)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{name}/")
        elif item is None or isinstance(item, int | float):
            yield prefix + name, item


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
