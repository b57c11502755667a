"""Peak memory and traffic of a training step beside plain fine-tuning, from the compiled programs.

Nothing is run and no weights are needed. Plain fine-tuning is the same code without per-language
gradients, on the same tokens. Prints Markdown; ``--json`` keeps the numbers.

    python benchmarks/memory.py --devices 8 --languages 8
    python benchmarks/memory.py --devices 1 --languages 2 4 8 16 32 64 --blocks layer module
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import programs
from common import bullets, environment, markdown

from jaxmoo.engine.cost import compile_to_count, memory
from jaxmoo.train.plan import bytes_sent

GRADIENTS = ("reduce-scatter", "all-to-all", "all-reduce")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    programs.add_flags(parser)
    parser.add_argument("--languages", type=int, nargs="*", default=[2, 4, 8, 16, 32, 64])
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", flags.devices)
    rows: list[dict[str, Any]] = []
    for k in flags.languages:
        plain = measure(flags, k, "plain", "mean", "layer")
        rows.append(plain | {"ratio": 1.0})
        for contestant in programs.contestants(flags):
            row = measure(flags, k, *contestant)
            rows.append(row | {"ratio": row["peak"] / plain["peak"]})
            print(rows[-1], file=sys.stderr, flush=True)
    about = environment(os.cpu_count() or 1, ["jax", "jaxlib"])
    print(bullets(about), report(rows), sep="\n\n")
    if flags.json:
        Path(flags.json).write_text(json.dumps({"about": about, "rows": rows}, indent=1))


def measure(
    flags: argparse.Namespace, languages: int, engine: str, method: str, blocks: str
) -> dict[str, Any]:
    """Compile one step; return its memory and traffic per device, in bytes."""
    step = programs.step(flags, languages, engine, method, blocks)
    traced = step.function.trace(*step.arguments)
    compiled = compile_to_count(traced.lower())
    found, sent = memory(compiled), bytes_sent(step, traced, compiled)
    return {
        "languages": languages,
        "engine": engine,
        "aggregator": method,
        "blocks": blocks,
        "number of blocks": len(step.gradients.partition),
        "peak": found["peak"],
        "temporaries": found["temporaries"],
        "gradients sent": sum(sent.get(kind, 0) for kind in GRADIENTS),
        "parameters sent": sent.get("all-gather", 0),
    }


def report(rows: list[dict[str, Any]]) -> str:
    table = [["step", "K", "blocks", "peak MB", "of plain", "gradients sent MB", "gathered MB"]]
    for row in rows:
        name = row["engine"] if row["engine"] == "plain" else f"{row['engine']} {row['aggregator']}"
        kind = "" if row["engine"] == "plain" else f"{row['blocks']} ({row['number of blocks']})"
        sent = [row["gradients sent"], row["parameters sent"]]
        table.append(
            [
                name,
                str(row["languages"]),
                kind,
                f"{row['peak'] / 1e6:,.1f}",
                f"{row['ratio']:.3f}",
                *(f"{x / 1e6:,.3f}" for x in sent),
            ]
        )
    return markdown(table)


if __name__ == "__main__":
    main()
