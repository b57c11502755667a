"""Tokens per second of the data pipeline beside those of the training step.

    python benchmarks/input.py --config configs/quickstart.yaml
    python benchmarks/input.py --config configs/quickstart.yaml data.packing=true

Reads and tokenises a run's data, makes the batches of its first steps, puts them on the devices,
and runs its compiled step on them, with random weights of the model's shape. Prints Markdown;
``--json`` keeps the numbers. Tokens are those of examples: padding does not count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import jax
import running
from common import Pages, environment, markdown, seconds

from jaxmoo import mesh
from jaxmoo.config.training import load_config
from jaxmoo.data import count_tokens
from jaxmoo.data.load import load_data
from jaxmoo.hf import load_config as load_model_config
from jaxmoo.hf import resolve_source
from jaxmoo.runtime.processes import place
from jaxmoo.train.planning import abstract_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="YAML file with the run's settings")
    parser.add_argument("--steps", type=int, default=5, help="training steps to time (5); 0: none")
    parser.add_argument("--batches", type=int, default=200, help="batches to make (200)")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    flags = parser.parse_args()
    config = load_config(flags.config, [*flags.overrides, "data.cache=none"])
    packages = ["jax", "tokenizers", "transformers"]
    pages = Pages(flags.json, environment(os.cpu_count() or 1, packages))

    source = resolve_source(config.model.source)
    begun = time.perf_counter()
    data = load_data(config, source, say=lambda _: None)
    took = time.perf_counter() - begun
    corpus = [*data.corpus.train.values(), *data.corpus.held_out.values()]
    tokens = sum(len(example.tokens) for examples in corpus for example in examples)
    pages.add({"stage": "read, split and tokenise everything, once", **rate(took, tokens)})

    made, times = [], []
    for step in range(flags.batches):
        begun = time.perf_counter()
        batch = data.batches.batch(step)
        times.append(time.perf_counter() - begun)
        made.append(batch)
    tokens = statistics.mean(int(count_tokens(batch).sum()) for batch in made)
    fetched = statistics.median(times)
    pages.add({"stage": "make a step's batch", **rate(fetched, tokens)})

    step = abstract_step(config, load_model_config(source), attention=config.model.attention)
    sharding = mesh.batch_sharding(step.device_mesh)
    times = []
    for batch in made[1:]:
        begun = time.perf_counter()
        jax.block_until_ready(place(batch, sharding))
        times.append(time.perf_counter() - begun)
    placed = statistics.median(times)
    pages.add({"stage": "put it on the devices", **rate(placed, tokens)})

    if flags.steps:
        (program,) = running.compile_steps([step])
        weights = running.random_weights(step)
        times = []
        for number in range(flags.steps + 1):
            weights, _, took = program.run(weights, made[number % len(made)])
            times.append(took.wall)
        took = statistics.median(times[1:])  # the first warms up
        pages.add({"stage": "the training step", **rate(took, tokens)})
        pages.add({"share of a step": (fetched + placed) / took})
    print(pages.markdown(report))


def rate(took: float, tokens: float) -> dict[str, float]:
    return {"seconds": took, "tokens per second": tokens / took}


def report(rows: list[dict[str, Any]]) -> str:
    stages = [row for row in rows if "stage" in row]
    table = [["stage", "s", "tokens/s"]]
    for row in stages:
        took = row["seconds"]
        text = f"{took:.2e}" if took < 0.01 else seconds(took)
        table.append([row["stage"], text, f"{row['tokens per second']:,.0f}"])
    if stages == rows:
        return markdown(table)
    share = rows[-1]["share of a step"]
    return (
        f"{markdown(table)}\n\nBatches take {share:.2%} of a step's time, on the host, beside it."
    )


if __name__ == "__main__":
    main()
