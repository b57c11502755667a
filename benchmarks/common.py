"""What the benchmarks share: the machine they run on and how they write tables."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np


def prepare(threads: int) -> None:
    """Confine this process to so many CPU cores; call before the first array is made.

    XLA sizes its thread pool by the cores that the process may use at that moment.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    jax.config.update("jax_platforms", "cpu")


def environment(threads: int, packages: Sequence[str]) -> dict[str, str]:
    """Hardware, versions, date, command."""
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    versions = [f"Python {platform.python_version()}"]
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return {
        "hardware": f"{cpu}, {threads} threads of {os.cpu_count()} cores",
        "versions": ", ".join(versions),
        "date": datetime.date.today().isoformat(),
        "command": f"`python {shlex.join(sys.argv)}`",
    }


class Pages:
    """Rows of measurements, kept in a file as they are measured."""

    def __init__(self, file: str | None, about: dict[str, str]) -> None:
        self.file, self.about = file, about
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        print(json.dumps(shown), file=sys.stderr, flush=True)
        if self.file:
            text = json.dumps({"about": self.about, "rows": self.rows}, indent=1)
            Path(self.file).write_text(text + "\n")

    def markdown(self, report: Callable[[list[dict[str, Any]]], str]) -> str:
        """The circumstances and the table."""
        return f"{bullets(self.about)}\n\n{report(self.rows)}"


def bullets(about: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in about.items())


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its header, and all columns but the first are numbers."""
    align = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], align, *rows[1:]])


def step_name(row: dict[str, Any]) -> str:
    """What a row of a step is called."""
    plain = row["engine"] == "plain"
    gram = row.get("gram", "exact")
    sketched = "" if gram == "exact" else f", {gram}"
    return "plain" if plain else f"{row['engine']} {row['aggregator']}{sketched}"


def gigabytes(x: float | None) -> str:
    return "" if x is None else f"{x / 1e9:,.2f}"


def seconds(x: float | None) -> str:
    return "" if x is None else f"{x:.3f}" if x < 10 else f"{x:.1f}"


def ratio(x: float | None, digits: int = 2) -> str:
    return "" if x is None else f"{x:.{digits}f}"


def quartiles(values: Sequence[float]) -> list[float]:
    if len(values) == 1:
        return [*values] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def scientific(x: float) -> str:
    return "failed" if not np.isfinite(x) else f"{x:.0e}".replace("e-0", "e-").replace("e+00", "")


def milliseconds(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 1 else f"{x:.2f}"


def plain(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"
