"""Time and memory of a training step beside plain fine-tuning on the same tokens.

Plain fine-tuning is the same code without per-language gradients. All steps share one set of
parameters and run in turn, in rotating order; a step's time is divided by the plain step's of the
same round, and the median of these ratios is reported. Prints Markdown; ``--json`` keeps the
numbers.

    python benchmarks/step.py --layers 8 --languages 8 --sequence-length 64
    python benchmarks/step.py --platform gpu --model Qwen3-0.6B --dtype bfloat16 \\
        --batch-size 4 --sequence-length 1024
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import programs
from common import bullets, environment, markdown

from jaxmoo.blocks import path_string
from jaxmoo.engine.cost import memory
from jaxmoo.train.plan import AbstractStep


class Contestant(NamedTuple):
    """A compiled step with what it alone needs."""

    engine: str
    aggregator: str
    blocks: str
    step: AbstractStep
    compiled: Any
    seconds: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    programs.add_flags(parser)
    parser.add_argument("--languages", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--platform", default="cpu", help="cpu (default), gpu or tpu")
    flags = parser.parse_args()
    if flags.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", flags.devices)
    chosen = [("plain", "mean", "layer"), *programs.contestants(flags)]
    found = run([prepare(flags, *contestant) for contestant in chosen], flags.rounds)
    about = environment(os.cpu_count() or 1, ["jax", "jaxlib"]) | {
        "devices": f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    }
    print(bullets(about), report(found), sep="\n\n")
    if flags.json:
        Path(flags.json).write_text(json.dumps({"about": about, "rows": found}, indent=1))


def prepare(flags: argparse.Namespace, engine: str, method: str, blocks: str) -> Contestant:
    """Compile a step."""
    print(f"compiling {engine} {method} {blocks}", file=sys.stderr, flush=True)
    step = programs.step(flags, flags.languages, engine, method, blocks)
    compiled = step.function.lower(*step.arguments).compile()
    return Contestant(engine, method, blocks, step, compiled, [])


def run(contestants: list[Contestant], rounds: int) -> list[dict[str, Any]]:
    """Time all contestants; return a row for each."""
    state = initial_state(contestants[0].step)
    for number in range(rounds + 1):
        for at in range(len(contestants)):
            contestant = contestants[(at + number) % len(contestants)]
            state, seconds = timed(contestant, state, number)
            if number:  # the first round warms up
                contestant.seconds.append(seconds)
    plain = contestants[0]
    rows = []
    for c in contestants:
        ratios = [mine / its for mine, its in zip(c.seconds, plain.seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        peak = memory(c.compiled)["peak"]
        rows.append(
            {
                "engine": c.engine,
                "aggregator": c.aggregator,
                "blocks": c.blocks,
                "seconds": statistics.median(c.seconds),
                "ratio": middle,
                "spread": [low, high],
                "peak": peak,
                "peak ratio": peak / memory(plain.compiled)["peak"],
            }
        )
    return rows


def initial_state(step: AbstractStep) -> Any:
    """Random parameters and an empty optimiser, as a step takes them."""
    shapes = step.arguments[0]

    def draw(path: Any, x: Any) -> jax.Array:
        name = path_string(path)
        if name.endswith("scale"):
            return jnp.ones(x.shape, x.dtype)
        return jax.random.normal(jax.random.key(len(name)), x.shape, x.dtype) * 0.02

    def make() -> tuple[Any, Any]:
        params = jax.tree_util.tree_map_with_path(draw, shapes.params)
        return params, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.opt_state)

    shardings = jax.tree.map(lambda x: x.sharding, (shapes.params, shapes.opt_state))
    params, opt_state = jax.jit(make, out_shardings=shardings)()
    return shapes._replace(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)


def timed(contestant: Contestant, state: Any, number: int) -> tuple[Any, float]:
    """Run one step; return the new state and its seconds."""
    shapes, frozen, batch = contestant.step.arguments
    resolver = contestant.step.gradients.init(shapes.params)
    tokens = jax.random.randint(jax.random.key(number), batch["tokens"].shape, 0, 1000)
    filled = {"tokens": tokens, "loss_mask": jnp.ones(tokens.shape, bool)}
    mine = state._replace(resolver=resolver)
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), mine, shapes)
    given = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), filled, batch)
    jax.block_until_ready((placed, given))
    begun = time.perf_counter()
    new, metrics = contestant.compiled(placed, frozen, given)
    jax.block_until_ready((new, metrics))
    return new, time.perf_counter() - begun


def report(rows: list[dict[str, Any]]) -> str:
    table = [["step", "blocks", "ms", "of plain", "spread", "peak MB", "of plain"]]
    for row in rows:
        plain = row["engine"] == "plain"
        low, high = row["spread"]
        table.append(
            [
                "plain" if plain else f"{row['engine']} {row['aggregator']}",
                "" if plain else row["blocks"],
                f"{row['seconds'] * 1e3:,.1f}",
                f"{row['ratio']:.3f}",
                "" if plain else f"{low:.3f}–{high:.3f}",
                f"{row['peak'] / 1e6:,.1f}",
                f"{row['peak ratio']:.3f}",
            ]
        )
    return markdown(table)


if __name__ == "__main__":
    main()
