"""What sketched Gram matrices cost in accuracy and gain in time, on real gradients.

    python benchmarks/sketches.py --json sketches.json
    python benchmarks/sketches.py 'model.trainable=^layers\\.[0-7]\\.'   # other layers

Takes every language's gradients of the quick start's trainable layers at the model's published
weights, one real batch per step, and forms every layer's Gram matrix exactly and from sketches of
several sizes, by the form of CPUs and GPUs and by that of TPUs. Every method that reads a Gram
matrix solves all of them, through the same steps; what is compared are the updates: the length of
the difference over that of the exact one, from the exact Gram matrix in float64. Then resolving one
layer is timed, exact beside sketched, in alternation. Prints Markdown; ``--json`` keeps the
numbers.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Pages, environment, markdown, milliseconds, prepare, quartiles, ratio
from flax import nnx

from jaxmoo import aggregators, resolve_conflicts, stacked_value_and_grad
from jaxmoo.aggregators import Aggregator
from jaxmoo.blocks import Partition, partition
from jaxmoo.blocks.sections import (
    Section,
    cut,
    section_place,
    sum_by_block,
    uniform_sections,
)
from jaxmoo.config.training import load_config
from jaxmoo.data.load import load_data
from jaxmoo.errors import ConfigError
from jaxmoo.hf import load_config as load_model_config
from jaxmoo.hf import load_model, resolve_source
from jaxmoo.kernels.reductions import section_grams
from jaxmoo.models import language_loss
from jaxmoo.models.paths import STACKED
from jaxmoo.runs.trained_parameters import run_segments, split_model
from jaxmoo.sketched import check_sketchable, grams_of_sketches, sketch_blocks

FORMS = {"cpu": "rolled (CPUs, GPUs)", "interpret-tpu": "folded (TPUs)"}
# Ranks gradients and takes the first: an arbitrarily small change of the Gram matrix may change it.
NOT_CONTINUOUS = {"krum"}
GOAL = 0.02  # relative error of the update, of
GOAL_SIZE = 16_384  # numbers per sketch


def methods() -> list[Aggregator]:
    """Those that read a Gram matrix which can be sketched."""
    found = []
    for name in aggregators.names():
        if name == "constant":  # the one that has no defaults; it reads no Gram matrix
            continue
        method = aggregators.get(name)
        try:
            check_sketchable([method])
        except ConfigError:
            continue
        if method.reads_gram:
            found.append(method)
    return found


def gradients(overrides: Sequence[str], steps: int) -> tuple[Partition, Iterator[list[jax.Array]]]:
    """The trained layers, and every language's gradients of them, [K, ...] per array and step."""
    config = load_config("configs/quickstart.yaml", overrides)
    source = resolve_source(config.model.source)
    data = load_data(config, source, say=lambda _: None)
    decoder = load_model(
        source,
        segments=run_segments(config, load_model_config(source)),
        dtype=jnp.dtype(config.model.dtype),
        param_dtype=jnp.dtype(config.model.param_dtype),
    )
    graph, params, frozen = split_model(config, decoder)
    part = partition("layer", params, stacked=STACKED)

    @jax.jit
    def of(params: Any, frozen: Any, batch: Any) -> list[jax.Array]:
        def loss(params: Any, one: Any) -> jax.Array:
            return language_loss(nnx.merge(graph, params, frozen), one)

        return jax.tree.leaves(stacked_value_and_grad(loss)(params, batch)[1])

    return part, (of(params, frozen, data.batches.batch(step)) for step in range(steps))


def in_sections(part: Partition, leaves: Sequence[jax.Array]) -> list[Section]:
    """Gradients by the layer they lie in."""
    return [
        Section(
            cut(x, len(labels)),
            labels,
            uniform_sections(i, x.shape[1:], len(labels)),
            places=section_place(i, np.arange(len(labels))),
        )
        for i, (x, labels) in enumerate(zip(leaves, part.labels, strict=True))
    ]


def grams_of(part: Partition) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Make the two programs: gradients to exact Gram matrices [B, K, K], and to estimated ones."""

    @jax.jit
    def exact(leaves: Sequence[jax.Array]) -> jax.Array:
        sections = in_sections(part, leaves)
        found = section_grams([s.values for s in sections])
        labels = [jnp.asarray(s.labels) for s in sections]
        return sum_by_block([x[:, None] for x in found], labels, len(part))

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def estimated(
        leaves: Sequence[jax.Array], key: jax.Array, size: int, form: str
    ) -> tuple[jax.Array, jax.Array]:
        z = sketch_blocks(
            in_sections(part, leaves), jnp.arange(len(part)), size, key=key, platform=form
        )
        found = grams_of_sketches(z)
        return found.gram, found.error

    return exact, estimated


def weights(method: Aggregator, grams: Sequence[jax.Array]) -> list[np.ndarray]:
    """[B, K] of every step; the steps of one run, whose random numbers are the same in all runs."""
    state, found = None, []
    for step, gram in enumerate(grams):
        mine, state = aggregators.weigh_blocks(
            method, gram, state=state, key=jax.random.fold_in(jax.random.key(0), step)
        )
        found.append(np.asarray(mine, np.float64))
    return found


def lengths(w: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """|J^T w| of every block [B]."""
    return np.sqrt(np.maximum(np.einsum("bk,bkl,bl->b", w, gram, w), 0))


def off(found: list[np.ndarray], wanted: list[np.ndarray], exact: list[np.ndarray]) -> np.ndarray:
    """Relative errors of updates [steps, B]."""
    pairs = zip(found, wanted, exact, strict=True)
    return np.stack([lengths(a - b, gram) / lengths(b, gram) for a, b, gram in pairs])


def summary(errors: Sequence[np.ndarray]) -> dict[str, float]:
    """Median and largest of the blocks, each the mean over steps and seeds [steps, B]."""
    every = np.concatenate(errors)
    return {
        "median": float(np.median(every, axis=1).mean()),
        "largest": float(every.max(1).mean()),
    }


def accuracy(pages: Pages, flags: argparse.Namespace) -> None:
    runs = [(form, size) for form in FORMS for size in flags.sizes]
    exact: list[jax.Array] = []
    estimated: dict[Any, list[list[jax.Array]]] = {
        run: [[] for _ in range(flags.seeds)] for run in runs
    }
    gram_errors: dict[Any, list[Any]] = {run: [] for run in runs}
    part, every = gradients(flags.overrides, flags.steps)
    exact_grams, estimated_grams = grams_of(part)
    for step, leaves in enumerate(every):
        exact.append(exact_grams(leaves))
        gram = np.asarray(exact[-1], np.float64)
        for form, size in runs:
            for seed in range(flags.seeds):
                key = jax.random.fold_in(jax.random.key(seed), step)
                found, error = estimated_grams(leaves, key, size, form)
                estimated[form, size][seed].append(found)
                true = np.linalg.norm(found - gram, axis=(1, 2)) / np.linalg.norm(gram, axis=(1, 2))
                gram_errors[form, size].append((true, np.asarray(error)))
    pages.add(about_gradients(exact))
    for form, size in runs:
        true, said = (np.stack(x) for x in zip(*gram_errors[form, size], strict=True))
        pages.add(
            {
                "what": "gram",
                "form": form,
                "size": size,
                "true": float(np.median(true)),
                "estimated": float(np.median(said)),
                "mean squares": float((said**2).mean() / (true**2).mean()),
                "within two": float((np.abs(np.log2(said / true)) < 1).mean()),
            }
        )
    grams = [np.asarray(gram, np.float64) for gram in exact]
    for method in methods():
        wanted = weights(method, exact)
        mean = [np.full_like(w, 1 / w.shape[1]) for w in wanted]
        row = {"what": "method", "method": method.name}
        pages.add(row | {"form": "mean", "size": 0} | summary([off(mean, wanted, grams)]))
        for form, size in runs:
            errors = [off(weights(method, found), wanted, grams) for found in estimated[form, size]]
            pages.add(row | {"form": form, "size": size} | summary(errors))


def about_gradients(exact: Sequence[jax.Array]) -> dict[str, Any]:
    """Norms, cosines, and over how many directions the gradients spread."""
    grams = np.concatenate([np.asarray(x, np.float64) for x in exact])
    norms = np.sqrt(np.diagonal(grams, axis1=1, axis2=2))
    cosines = grams / norms[:, :, None] / norms[:, None, :]
    pairs = cosines[:, *np.triu_indices(grams.shape[1], 1)]
    spread = np.trace(grams, axis1=1, axis2=2) ** 2 / (grams**2).sum((1, 2))
    return {
        "what": "gradients",
        "blocks": len(exact[0]),
        "steps": len(exact),
        "languages": grams.shape[1],
        "norms": [float(norms.min()), float(norms.max())],
        "cosines": [float(pairs.min()), float(np.median(pairs)), float(pairs.max())],
        "directions": float(np.median(spread)),
    }


# --- Time --------------------------------------------------------------------------------------


# Matrices of a layer of SmolLM2-135M.
LAYER = [(576, 576), (576, 192), (576, 192), (576, 576), *[(576, 1536)] * 3, (576,), (576,)]


def timing(pages: Pages, flags: argparse.Namespace) -> None:
    random = np.random.default_rng(0)
    for k in flags.objectives:
        common = random.standard_normal((1, 2**16), np.float32)
        updates = [
            jnp.asarray(
                random.standard_normal((k, *shape), np.float32) + np.resize(common, (1, *shape))
            )
            for shape in LAYER
        ]
        for name in flags.timed:
            forms = ["exact", f"sketch:{GOAL_SIZE}"]
            pages.add(
                {"what": "time", "objectives": k, "method": name} | paired(name, forms, updates)
            )


def paired(name: str, grams: Sequence[str], updates: list[jax.Array]) -> dict[str, Any]:
    """Seconds of resolving one layer both ways, and quartiles of the ratio within a round."""
    runs: list[Callable[[], Any]] = []
    for gram in grams:
        tx = resolve_conflicts(name, lambda path: 0, gram=gram)
        state = tx.init([x[0] for x in updates])
        program = jax.jit(tx.update).lower(updates, state).compile()
        runs.append(functools.partial(program, updates, state))
    times: list[list[float]] = []
    end = time.perf_counter() + 8
    while len(times) < 6 or time.perf_counter() < end:
        row = []
        for run in runs:
            begun = time.perf_counter()
            jax.block_until_ready(run())
            row.append(time.perf_counter() - begun)
        times.append(row)
    del times[0]  # warms up
    exact, sketched = (statistics.median(row[i] for row in times) for i in range(2))
    return {
        "exact": exact,
        "sketched": sketched,
        "ratio": quartiles([row[1] / row[0] for row in times]),
    }


# --- Report ------------------------------------------------------------------------------------


def report(rows: list[dict[str, Any]]) -> str:
    parts = []
    for row in (r for r in rows if r["what"] == "gradients"):
        least, median, most = row["cosines"]
        parts.append(
            f"{row['languages']} languages, {row['blocks']} layers, {row['steps']} steps. Norms "
            f"{row['norms'][0]:.2g} to {row['norms'][1]:.2g}, cosines {least:.2f} to {most:.2f} "
            f"(median {median:.2f}); the gradients of a layer spread over "
            f"{row['directions']:.1f} directions (tr(G)² / ‖G‖²)."
        )
    grams = [r for r in rows if r["what"] == "gram"]
    if grams:
        header = ["error of the Gram matrix, N", "true", "`gram_error`", "ratio of mean squares"]
        table = [[*header, "within a factor of two"]]
        for row in grams:
            table.append(
                [
                    f"{FORMS[row['form']]}, {row['size']:,}",
                    *(f"{row[x]:.4f}" for x in ("true", "estimated")),
                    ratio(row["mean squares"]),
                    f"{row['within two']:.0%}",
                ]
            )
        parts.append(markdown(table))
    updates = [r for r in rows if r["what"] == "method"]
    for form in FORMS if updates else ():
        parts.append(f"Relative error of the update, {FORMS[form]}: median (largest) layer\n")
        parts[-1] += "\n" + update_table([r for r in updates if r["form"] in (form, "mean")])
    if updates:
        parts.append(goal(updates))
    times = [r for r in rows if r["what"] == "time"]
    if times:
        header = ["one layer, K, method", "exact ms", f"sketch:{GOAL_SIZE} ms", "ratio (quartiles)"]
        table = [header]
        for row in times:
            low, middle, high = row["ratio"]
            table.append(
                [
                    f"{row['objectives']}, `{row['method']}`",
                    *(milliseconds(1e3 * row[x]) for x in ("exact", "sketched")),
                    f"{ratio(middle)} ({ratio(low)}–{ratio(high)})",
                ]
            )
        parts.append(markdown(table))
    return "\n\n".join(parts)


def update_table(rows: list[dict[str, Any]]) -> str:
    sizes = sorted({r["size"] for r in rows} - {0})
    table = [["method", *(f"N = {size:,}" for size in sizes), "plain mean instead"]]
    for name in dict.fromkeys(r["method"] for r in rows):
        mine = {r["size"]: r for r in rows if r["method"] == name}
        cells = [f"{mine[s]['median']:.3f} ({mine[s]['largest']:.3f})" for s in [*sizes, 0]]
        table.append([f"`{name}`" + " †" * (name in NOT_CONTINUOUS), *cells])
    return markdown(table)


def goal(rows: list[dict[str, Any]]) -> str:
    """The goal, with what was measured."""
    lines = []
    for form, which in itertools.product(FORMS, ("median", "largest")):
        judged = [
            r
            for r in rows
            if (r["form"], r["size"]) == (form, GOAL_SIZE) and r["method"] not in NOT_CONTINUOUS
        ]
        if not judged:
            continue
        missed = sorted((r for r in judged if r[which] > GOAL), key=lambda r: -r[which])
        names = ", ".join(f"`{r['method']}` {r[which]:.3f}" for r in missed)
        reached = f"{len(judged) - len(missed)} of {len(judged)} methods; missed by {names}."
        lines.append(
            f"- Error at most {GOAL} at N = {GOAL_SIZE:,}, {FORMS[form]}, {which} layer: "
            + (reached if missed else "met by all continuous methods.")
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 1024, 4096, 16_384, 65_536])
    parser.add_argument("--seeds", type=int, default=2, help="sketches of every batch (2)")
    parser.add_argument("--steps", type=int, default=3, help="batches (3)")
    parser.add_argument("--objectives", type=int, nargs="*", default=[8, 64], help="of the timing")
    parser.add_argument("--timed", nargs="*", default=["cagrad"], help="methods")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    flags = parser.parse_args()
    prepare(flags.threads)
    pages = Pages(flags.json, environment(flags.threads, ["jax", "jaxlib"]))
    if flags.steps:
        accuracy(pages, flags)
    timing(pages, flags)
    print(pages.markdown(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
