"""How long the first step of an optax chain takes to start, beside a plain one.

A step of a small model, in plain optax code: K batches in one, AdamW. Then the same with one
gradient per objective, averaged over the tree, and with `jaxmoo.resolve_conflicts` in the chain.
Each is traced, lowered and compiled several times, in turn, in one process without any cache, and
run as often. Seconds are those of all cores together, which other processes hardly change, except
a step's, and ratios are to the plain step: medians.

    python benchmarks/compile_time.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Pages, environment, markdown, milliseconds, prepare, ratio, seconds

import jaxmoo

K, VOCABULARY, LENGTH, ROWS = 4, 256, 32, 4
STAGES = ("trace", "lower", "compile")
METHODS = ["mean", "cagrad", "upgrad", "pcgrad", "mgda", "graddrop"]


class Step(NamedTuple):
    name: str
    function: Callable[..., Any]  # (params, state, batch) -> (params, state, losses)
    transformation: optax.GradientTransformation


def parameters(layers: int, width: int) -> dict[str, Any]:
    """8 arrays per layer, and the embedding."""
    random = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape, np.float32) * 0.02)

    def layer() -> dict[str, Any]:
        square = {name: draw(width, width) for name in ("query", "key", "value", "out")}
        wide = {"up": draw(width, 4 * width), "down": draw(4 * width, width)}
        return {**square, **wide, "norm_1": jnp.ones(width), "norm_2": jnp.ones(width)}

    body = {f"layer_{i:02}": layer() for i in range(layers)}
    return {"embedding": draw(VOCABULARY, width), **body}


def loss_fn(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Next-token loss of one objective, tokens [rows, length]."""
    x = params["embedding"][tokens]
    for name, layer in params.items():
        if name != "embedding":
            h = normed(x) * layer["norm_1"]
            q, k, v = (h @ layer[name] for name in ("query", "key", "value"))
            scores = jnp.where(jnp.tri(x.shape[1]), q @ k.mT * x.shape[2] ** -0.5, -1e9)
            x = x + jax.nn.softmax(scores) @ v @ layer["out"]
            h = normed(x) * layer["norm_2"]
            x = x + jax.nn.gelu(h @ layer["up"]) @ layer["down"]
    logits = normed(x[:, :-1]) @ params["embedding"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def normed(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def plain() -> Step:
    tx = optax.adamw(1e-3)

    def step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any, Any]:
        loss, gradients = jax.value_and_grad(loss_fn)(params, batch.reshape(-1, LENGTH))
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return Step("plain", step, tx)


def stacked(name: str, first: optax.GradientTransformation) -> Step:
    tx = optax.chain(first, optax.adamw(1e-3))

    def step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any, Any]:
        losses, gradients = jaxmoo.stacked_value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, losses

    return Step(name, step, tx)


def averaged() -> Step:
    def mean(gradients: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(lambda x: x.mean(0), gradients)

    return stacked("a mean over the tree", optax.stateless(mean))


def build(step: Step, arguments: tuple[Any, ...]) -> tuple[Any, dict[str, float]]:
    """The compiled program, and what every stage took of all cores."""
    function = jax.jit(lambda *given: step.function(*given), donate_argnums=(0, 1))
    clock = [time.process_time()]

    def done(stage: Any) -> Any:
        clock.append(time.process_time())
        return stage

    traced = done(function.trace(*arguments))
    lowered = done(traced.lower())
    program = done(lowered.compile())
    return program, dict(zip(STAGES, np.diff(clock).tolist(), strict=True))


def once(step: Step, program: Any, params: Any, batch: jax.Array) -> Callable[[], float]:
    """A function that runs the step once more and returns how long it took."""
    kept = [jax.tree.map(jnp.copy, params), step.transformation.init(params)]

    def run() -> float:
        begun = time.perf_counter()
        *kept[:], losses = program(*kept, batch)
        jax.block_until_ready((kept, losses))
        return time.perf_counter() - begun

    return run


def measure(
    steps: list[Step], layers: int, width: int, rounds: int, runs: int
) -> list[dict[str, Any]]:
    params = parameters(layers, width)
    batch = jax.random.randint(jax.random.key(0), (K, ROWS, LENGTH), 0, VOCABULARY)
    programs, took = {}, {step.name: [] for step in steps}
    for number in range(rounds + 1):
        for step in steps:
            state = jax.eval_shape(step.transformation.init, params)
            programs[step.name], stages = build(step, (params, state, batch))
            if number:  # the first makes what is made once in a process
                took[step.name].append(stages)
            jax.clear_caches()
    each = {step.name: once(step, programs[step.name], params, batch) for step in steps}
    times: dict[str, list[float]] = {name: [] for name in each}
    for number in range(runs + 3):
        for name, run in each.items():
            found = run()
            if number >= 3:
                times[name].append(found)
    rows = []
    for step in steps:
        stages = {
            stage: statistics.median(one[stage] for one in took[step.name]) for stage in STAGES
        }
        total = statistics.median(sum(one.values()) for one in took[step.name])
        beside = [sum(one.values()) for one in took["plain"]]
        row = {"width": width, "step": step.name, **stages, "total": total}
        row["ratio"] = total / statistics.median(beside)
        row["run"] = statistics.median(times[step.name])
        row["run ratio"] = statistics.median(
            a / b for a, b in zip(times[step.name], times["plain"], strict=True)
        )
        row["temporary"] = programs[step.name].memory_analysis().temp_size_in_bytes
        rows.append(row)
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    header = ["step", *(f"{stage} s" for stage in STAGES), "all s", "/ plain"]
    text = []
    for width in dict.fromkeys(row["width"] for row in rows):
        table = [[*header, "a step, ms", "/ plain", "temporary MB"]]
        for row in (row for row in rows if row["width"] == width):
            cells = [row["step"], *(seconds(row[stage]) for stage in (*STAGES, "total"))]
            cells += [ratio(row["ratio"]), milliseconds(row["run"] * 1e3)]
            table.append([*cells, ratio(row["run ratio"]), f"{row['temporary'] / 1e6:.1f}"])
        text.append(f"Width {width}:\n\n{markdown(table)}")
    return "\n\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--blocks", nargs="*", default=["layer", "leaf"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--widths", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=3, help="how often each is compiled")
    parser.add_argument("--runs", type=int, default=30, help="how often each is run")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", help="file for the numbers")
    flags = parser.parse_args()
    prepare(flags.threads)
    jax.config.update("jax_enable_compilation_cache", False)
    pages = Pages(flags.json, environment(flags.threads, ["jax", "jaxlib", "optax"]))
    steps = [plain(), averaged()]
    for blocks in flags.blocks:
        for method in flags.methods:
            resolver = jaxmoo.resolve_conflicts(method, blocks)
            steps.append(stacked(f"`{method}`, `{blocks}`", resolver))
    for width in flags.widths:
        for row in measure(steps, flags.layers, width, flags.rounds, flags.runs):
            pages.add(row)
    print(pages.markdown(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
