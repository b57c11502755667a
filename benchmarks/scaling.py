"""How a step's cost grows with languages, layers and devices, beside plain fine-tuning.

Counted in the compiled programs: peak memory, floating-point operations and bytes sent per device,
and how long tracing and compiling took. Nothing is run and no weights are needed, unless
``--rounds`` asks for times on the devices at hand. Plain fine-tuning is the same code without
per-language gradients, on the same tokens. Prints Markdown; ``--json`` keeps the numbers.

    python benchmarks/scaling.py --devices 8 --languages 8
    python benchmarks/scaling.py --languages 2 4 8 16 32 64 --blocks layer --no-stacked
    python benchmarks/scaling.py --layers 4 8 16 30 --blocks layer --rounds 3
    python benchmarks/scaling.py --devices 1 2 4 8 16 --blocks layer --no-stacked
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import programs
import running
from common import Pages, environment, gigabytes, markdown, ratio, seconds, step_name
from programs import PLAIN
from running import Program
from step import beside, warmed_up

GRADIENTS = ("reduce-scatter", "all-to-all", "all-reduce")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    programs.add_flags(parser)
    parser.add_argument("--languages", type=int, nargs="*", default=[8])
    parser.add_argument("--layers", type=int, nargs="*", default=[None], help="the model's")
    parser.add_argument("--devices", type=int, nargs="*", default=[1], help="virtual CPU devices")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of timing (none)")
    flags = parser.parse_args()
    pages = Pages(flags.json, environment(os.cpu_count() or 1, ["jax", "jaxlib"]))
    if len(flags.devices) > 1:
        for devices in flags.devices:
            for row in in_process(devices):
                pages.add(row)
    else:
        running.choose_platform("cpu", *flags.devices)
        for layers in flags.layers:
            for languages in flags.languages:
                measure(flags, languages, layers, pages)
    print(pages.markdown(report))


def in_process(devices: int) -> list[dict[str, Any]]:
    """Measure in a process of its own, because a process's number of devices is fixed."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.json"
        # The last of several equal flags counts.
        command = [sys.executable, *sys.argv, "--devices", str(devices), "--json", str(file)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text())["rows"]


def measure(flags: argparse.Namespace, languages: int, layers: int | None, pages: Pages) -> None:
    """Count, and time if asked, plain training and all it is compared with."""
    first: dict[str, Any] | None = None
    plain: Program | None = None
    for kind in (PLAIN, *programs.contestants(flags)):
        begun = time.process_time()
        found = programs.count(flags, languages, layers, kind)
        cpu = time.process_time() - begun
        row = {
            "devices": flags.devices[0],
            "languages": languages,
            "layers": programs.shape(flags, layers).num_hidden_layers,
            "engine": kind.engine,
            "aggregator": kind.aggregator,
            "blocks": kind.blocks,
            "gram": kind.gram,
            "number of blocks": found.blocks,
            "peak": found.total,
            "memory": found.memory,
            "flops": found.flops,
            "gradients sent": sum(found.collectives.get(k, 0) for k in GRADIENTS),
            "parameters sent": found.collectives.get("all-gather", 0),
            "compile seconds": found.compile_seconds,
            "compile cpu seconds": cpu,
        }
        first = first or row
        row |= {f"{name} ratio": row[name] / first[name] for name in ("peak", "flops")}
        if flags.rounds:
            step = programs.step(flags, languages, layers, kind)
            (program,) = running.compile_steps([step])
            if plain is None:
                plain = program
            else:
                weights = running.random_weights(plain.step)
                weights = warmed_up(program, warmed_up(plain, weights))
                row |= beside(plain, program, weights, flags.rounds)[2]
        pages.add(row)


def report(rows: list[dict[str, Any]]) -> str:
    header = ["step", "blocks", "devices", "K", "layers", "peak GB", "of plain", "TFLOP"]
    header += ["of plain", "gradients sent MB", "gathered MB", "compiled in s", "CPU s"]
    timed = any("ratio" in row for row in rows)
    table = [[*header, *(["s", "of plain"] if timed else [])]]
    for row in rows:
        plain = row["engine"] == "plain"
        table.append(
            [
                step_name(row),
                "" if plain else f"{row['blocks']} ({row['number of blocks']})",
                *(str(row[x]) for x in ("devices", "languages", "layers")),
                gigabytes(row["peak"]),
                f"{row['peak ratio']:.3f}",
                f"{row['flops'] / 1e12:,.3f}",
                f"{row['flops ratio']:.3f}",
                *(f"{row[x] / 1e6:,.3f}" for x in ("gradients sent", "parameters sent")),
                *(f"{row[x]:.1f}" for x in ("compile seconds", "compile cpu seconds")),
                *([seconds(row.get("seconds")), ratio(row.get("ratio"))] if timed else []),
            ]
        )
    return markdown(table)


if __name__ == "__main__":
    main()
