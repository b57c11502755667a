"""Time and memory of a training step beside plain fine-tuning on the same tokens.

Plain fine-tuning is the same code without per-language gradients. Each contestant runs in turn
with it, on one set of parameters; a step's time is divided by that of the plain step run next to
it, and the median of these ratios is reported. Prints Markdown; ``--json`` keeps the numbers, row
by row as they are measured.

    python benchmarks/step.py --languages 8 --sequence-length 512 --rounds 3 --blocks layer
    python benchmarks/step.py --platform gpu --model Qwen3-0.6B --dtype bfloat16 --remat dots \\
        --batch-size 4 --sequence-length 1024 --blocks layer
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import programs
import running
from common import Pages, environment, gigabytes, markdown, quartiles, ratio, seconds, step_name
from programs import PLAIN, Kind
from running import Program, Took, Weights

from jaxmoo.train.throughput import model_flops, peak_flops


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    programs.add_flags(parser)
    parser.add_argument("--layers", type=int, help="another number of layers than the model's")
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices (1)")
    parser.add_argument("--languages", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--platform", default="cpu", help="cpu (default), gpu or tpu")
    parser.add_argument("--trace", type=int, default=0, help="list the costliest kernels of a GPU")
    flags = parser.parse_args()
    running.choose_platform(flags.platform, flags.devices)
    pages = Pages(flags.json, about(flags))
    kinds = [PLAIN, *programs.contestants(flags)]
    steps = [programs.step(flags, flags.languages, flags.layers, kind) for kind in kinds]
    found = dict(zip(kinds, running.compile_steps(steps), strict=True))
    plain = found[PLAIN]
    first = described(flags, PLAIN, plain) | {"ratio": 1.0, "peak ratio": 1.0}
    weights = warmed_up(plain, running.random_weights(plain.step))
    pages.add(first | {"device peak": running.device_peak()})
    plain_seconds: list[float] = []
    for kind in kinds[1:]:
        row = described(flags, kind, found[kind])
        try:
            weights = warmed_up(found[kind], weights)
            # At most: the most that any step so far has needed.
            row |= {"device peak": running.device_peak()}
            weights, its, measured = beside(plain, found[kind], weights, flags.rounds)
            row |= measured
            plain_seconds += its
            pages.rows[0] |= speed(flags, plain, statistics.median(plain_seconds))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row |= {"failed": "out of memory"}
            del weights
            found[kind].resolver = None
            gc.collect()
            weights = warmed_up(plain, running.random_weights(plain.step))
        pages.add(row | {"peak ratio": row["peak"] / plain.peak})
    print(pages.markdown(report))
    if flags.trace:
        for kind in kinds:
            row = {"engine": kind.engine, "aggregator": kind.aggregator}
            weights, table = traced(found[kind], weights, flags.trace)
            print(f"\n{step_name(row)}, `{kind.blocks}`:\n\n{table}")
    return int(any("failed" in row for row in pages.rows if row["engine"] == "backward"))


def about(flags: argparse.Namespace) -> dict[str, str]:
    return environment(os.cpu_count() or 1, ["jax", "jaxlib"]) | {
        "devices": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "step": f"{flags.model}, {flags.layers or 'all'} layers, {flags.dtype}, "
        f"{flags.languages} languages x {flags.batch_size} x {flags.sequence_length} tokens"
        f"{', four texts a row' if flags.packing else ''}"
        f"{f', adapters of rank {flags.lora}' if flags.lora else ''}",
    }


def described(flags: argparse.Namespace, kind: Kind, program: Program) -> dict[str, Any]:
    return {
        "engine": kind.engine,
        "aggregator": kind.aggregator,
        "blocks": kind.blocks,
        "gram": kind.gram,
        "number of blocks": len(program.step.gradients.partition),
        "compile seconds": program.seconds,
        "peak": program.peak,
    }


def speed(flags: argparse.Namespace, plain: Program, seconds: float) -> dict[str, Any]:
    """Plain training's share of what the devices could do."""
    state, frozen, batch = plain.step.arguments
    rows, length = batch["tokens"].shape[1:]
    shape = programs.shape(flags, flags.layers)
    needed = model_flops(shape, state.params, frozen, rows * length, length)
    peak = peak_flops(jax.devices()[0])
    return {
        "seconds": seconds,
        "tokens per second": rows * length / seconds,
        "model flops per second": needed / seconds,
        "mfu": None if peak is None else needed / seconds / peak / jax.device_count(),
    }


def warmed_up(program: Program, weights: Weights) -> Weights:
    return program.run(weights, running.random_batch(program.step, 0))[0]


def beside(
    plain: Program, program: Program, weights: Weights, rounds: int
) -> tuple[Weights, list[float], dict[str, Any]]:
    """Time a step in turn with the plain one; both have run before.

    Returns:
      ``(weights, seconds of the plain step, what was measured of the other)``.
    """
    times: dict[bool, list[Took]] = {True: [], False: []}
    for number in range(rounds):
        for this in (plain, program) if number % 2 else (program, plain):
            batch = running.random_batch(this.step, number)
            weights, _, took = this.run(weights, batch)
            times[this is program].append(took)
    pairs = list(zip(times[True], times[False], strict=True))
    low, middle, high = quartiles([mine.wall / its.wall for mine, its in pairs])
    measured = {
        "seconds": statistics.median(took.wall for took in times[True]),
        "ratio": middle,
        "spread": [low, high],
        "cpu ratio": statistics.median(mine.cpu / its.cpu for mine, its in pairs),
    }
    return weights, [took.wall for took in times[False]], measured


def traced(program: Program, weights: Weights, most: int) -> tuple[Weights, str]:
    """Run a step under the profiler and list the kernels of GPUs that took most of its time."""
    took: Counter[str] = Counter()
    times: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            weights, _, _ = program.run(weights, running.random_batch(program.step, 0))
        (file,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines if "GPU" in plane.name else ():
                for event in line.events if line.name.startswith("Stream") else ():
                    took[event.name] += event.duration_ns
                    times[event.name] += 1
    rows = [[f"`{name[:80]}`", str(times[name]), f"{ns / 1e6:.2f}"] for name, ns in took.items()]
    rows.sort(key=lambda row: -float(row[2]))
    total = ["all", str(times.total()), f"{took.total() / 1e6:.2f}"]
    return weights, markdown([["kernel", "launches", "ms"], total, *rows[:most]])


def report(rows: list[dict[str, Any]]) -> str:
    on_device = any(row.get("device peak") for row in rows)
    header = ["step", "blocks", "s", "of plain", "quartiles", "CPU time of plain"]
    header += ["peak GB", "of plain"]
    table = [[*header, *(["on the device GB"] if on_device else [])]]
    for row in rows:
        plain = row["engine"] == "plain"
        low, high = row.get("spread", (1, 1))
        table.append(
            [
                step_name(row),
                "" if plain else f"{row['blocks']} ({row['number of blocks']})",
                row.get("failed") or seconds(row.get("seconds")),
                ratio(row.get("ratio")),
                "" if plain or "spread" not in row else f"{low:.2f}–{high:.2f}",
                ratio(row.get("cpu ratio")),
                gigabytes(row["peak"]),
                ratio(row["peak ratio"]),
                *([gigabytes(row.get("device peak"))] if on_device else []),
            ]
        )
    first = rows[0]
    if "seconds" not in first:
        return markdown(table)
    share = "" if first["mfu"] is None else f", MFU {first['mfu']:.1%}"
    speed = f"Plain: {first['tokens per second']:,.0f} tokens/s, "
    speed += f"{first['model flops per second'] / 1e12:.3g} model TFLOP/s{share}."
    return f"{markdown(table)}\n\n{speed}"


if __name__ == "__main__":
    raise SystemExit(main())
