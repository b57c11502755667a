"""Solves as one kernel beside the same solvers as XLA compiles them, on a GPU.

Times are medians of whole calls of :func:`jaxmoo.aggregators.weigh_blocks` from the host, beside
that of a call that does nothing. What a kernel finds must be what XLA's form finds: the updates'
difference is relative to the block's largest gradient. Prints Markdown; ``--json`` keeps the
numbers. On a CPU (``--platform cpu``) the kernels are interpreted, which shows only that all runs.

    python benchmarks/kernels.py --platform gpu
"""

from __future__ import annotations

import argparse
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
from jaxmoo.kernels.launch import solving_on

METHODS = ("cagrad", "mgda", "dualproj", "upgrad", "nash_mtl", "fairgrad")
# Of the largest gradient. Fair bargaining has no solution for rank-deficient and opposed gradients,
# and what is returned instead is rounding's to a good part, in both forms.
WRONG = dict.fromkeys(METHODS, 1e-3) | {"nash_mtl": 0.1, "fairgrad": 0.1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--platform", default="gpu", help="gpu (default) or cpu")
    parser.add_argument("--languages", type=int, nargs="*", default=[8, 16, 64])
    parser.add_argument("--num-blocks", type=int, default=32)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=20)
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


def took(call: Any, argument: jax.Array, rounds: int) -> float:
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
