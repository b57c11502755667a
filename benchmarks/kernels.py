"""Solves, and all of a layer's resolution, in kernels beside the same as XLA compiles it, on a GPU.

Times are medians of whole calls of :func:`jaxmoo.aggregators.weigh_blocks` from the host, beside
that of a call that does nothing. What a kernel finds must be what XLA's form finds: the updates'
difference is relative to the block's largest gradient. Prints Markdown; ``--json`` keeps the
numbers. Of a layer, the whole is timed and compared: Gram matrices of arrays of the shapes of
Qwen3-0.6B's (with ``--smoke``, of small ones), solve and weighted sums. On a CPU
(``--platform cpu``) the kernels are interpreted, which shows only that all runs.

    python benchmarks/kernels.py --platform gpu
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import running
from common import Pages, environment, markdown, scientific

from jaxmoo import aggregators
from jaxmoo.block_solve import Group
from jaxmoo.blocks.sections import Section
from jaxmoo.kernels.launch import solving_on
from jaxmoo.resolve import resolve_sections

METHODS = ("cagrad", "mgda", "dualproj", "upgrad", "nash_mtl", "fairgrad")
# Of the largest gradient. Fair bargaining has no solution for rank-deficient and opposed gradients,
# and what is returned instead is rounding's to a good part, in both forms.
WRONG = dict.fromkeys(METHODS, 1e-3) | {"nash_mtl": 0.1, "fairgrad": 0.1}
LAYER = "a layer, cagrad"
WRONG[LAYER] = 1e-2  # of updates in bfloat16
MATRICES = ((1024, 2048), (1024, 1024), (1024, 1024), (2048, 1024))  # of attention and MLP
MATRICES += ((1024, 3072), (1024, 3072), (3072, 1024))
VECTORS = (1024, 1024, 128, 128)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--platform", default="gpu", help="gpu (default) or cpu")
    parser.add_argument("--languages", type=int, nargs="*", default=[8, 16, 64])
    parser.add_argument("--num-blocks", type=int, default=32)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--smoke", action="store_true", help="a layer of small arrays")
    parser.add_argument("--json", help="file for the numbers")
    flags = parser.parse_args()
    running.choose_platform(flags.platform)
    pages = Pages(flags.json, about(flags))
    how = "gpu" if flags.platform == "gpu" else "interpret"
    for k in flags.languages:
        grams = problems(k, flags.num_blocks)
        for name in flags.methods:
            forms = {form: solver(name, k, form) for form in (None, how)}
            found = {form: np.asarray(solve(grams), np.float64) for form, solve in forms.items()}
            gap = found[how] - found[None]
            exact = np.asarray(grams, np.float64)
            square = np.einsum("bi,bij,bj->b", gap, exact, gap)
            square /= np.diagonal(exact, axis1=1, axis2=2).max(1)
            pages.add(
                {
                    "method": name,
                    "K": k,
                    "seconds": took(forms[how], grams, flags.rounds),
                    "seconds of XLA's": took(forms[None], grams, flags.rounds),
                    "difference": float(np.sqrt(np.maximum(square, 0)).max()),
                }
            )
        pages.add(layer(k, how, flags))
    nothing = took(jax.jit(lambda x: x + 1), jnp.ones(8), flags.rounds)
    print(pages.markdown(lambda rows: f"{report(rows)}\n\nAn empty call: {nothing * 1e6:.0f} us."))
    return int(not all(row["difference"] < WRONG[row["method"]] for row in pages.rows))


def about(flags: argparse.Namespace) -> dict[str, str]:
    return environment(os.cpu_count() or 1, ["jax", "jaxlib"]) | {
        "devices": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "solves": f"{flags.num_blocks} blocks in one call",
    }


def problems(k: int, count: int) -> jax.Array:
    """Gram matrices of regular, rank-deficient, badly scaled and opposed gradients."""
    random, grams = np.random.default_rng(k), []
    for i in range(count):
        rows = random.normal(size=(k, (50, k, max(1, k // 2), 20)[i % 4]))
        if i % 4 == 1:
            rows *= 10.0 ** random.uniform(-2, 2, (k, 1))
        if i % 4 == 3:
            rows[0] = -rows[-1]
        grams.append(rows @ rows.T)
    return jnp.asarray(np.stack(grams), jnp.float32)


def solver(name: str, k: int, form: str | None) -> Any:
    method = aggregators.get(name)

    def solve(grams: jax.Array) -> jax.Array:
        with solving_on(form):
            return aggregators.weigh_blocks(method, grams, active=jnp.ones(k, bool))[0]

    return jax.jit(solve)


def layer(k: int, how: str, flags: argparse.Namespace) -> dict[str, Any]:
    """Resolve one layer's gradients in both forms."""
    matrices, vectors = MATRICES, VECTORS
    if flags.smoke:
        matrices, vectors = ((256, 300),), (12,)
    shapes = [(jnp.bfloat16, n) for n in matrices] + [(jnp.float32, (n,)) for n in vectors]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    # What all have in common is a tenth of what each has of its own.
    arrays = [
        (jax.random.normal(key, (k, 1, *n)) + 0.1 * jax.random.normal(key, n)).astype(dtype)
        for key, (dtype, n) in zip(keys, shapes, strict=True)
    ]
    groups = [Group(aggregators.get("cagrad"), [0])]

    def resolve(platform: str | None, arrays: list[jax.Array]) -> list[jax.Array]:
        return resolve_sections(
            [Section(x, np.zeros(1, int), lambda *_: jnp.zeros(())) for x in arrays],
            groups,
            np.zeros(1, int),
            state=[()],
            key=jax.random.key(0),
            active=jnp.ones(k, bool),
            preference=None,
            match_norm=False,
            partitioned=False,
            platform=platform,
        ).updates

    forms = {form: jax.jit(functools.partial(resolve, form)) for form in (None, how)}
    pairs = list(zip(forms[how](arrays), forms[None](arrays), arrays, strict=True))
    return {
        "method": LAYER,
        "K": k,
        "seconds": took(forms[how], arrays, flags.rounds),
        "seconds of XLA's": took(forms[None], arrays, flags.rounds),
        "difference": max(
            float(jnp.linalg.norm((x - y).astype(jnp.float32)))
            / float(jnp.linalg.norm(z[0].astype(jnp.float32)))
            for x, y, z in pairs
        ),
    }


def took(call: Any, argument: Any, rounds: int) -> float:
    """Median seconds of a compiled call."""
    jax.block_until_ready(call(argument))
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        jax.block_until_ready(call(argument))
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def report(rows: list[dict[str, Any]]) -> str:
    table = [["method", "K", "one kernel, us", "XLA, us", "updates differ by"]]
    for row in rows:
        times = (f"{row[name] * 1e6:,.0f}" for name in ("seconds", "seconds of XLA's"))
        table.append([f"`{row['method']}`", str(row["K"]), *times, scientific(row["difference"])])
    return markdown(table)


if __name__ == "__main__":
    raise SystemExit(main())
