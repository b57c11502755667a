"""Accuracy and speed of the aggregators, beside TorchJD 0.18 and LibMTL's formulas.

One process, the same matrices (shared memory, no copies), the same number of threads. Timings are
interleaved: in every round each contestant runs once, in rotating order, and ratios are formed
within a round. Prints Markdown.

    python benchmarks/aggregators.py --json results.json    # a quarter of an hour on two cores
    python benchmarks/aggregators.py --json results.json --section blocks    # that one anew
    python benchmarks/aggregators.py --quick    # two minutes, to see that everything runs

``--json`` keeps the raw numbers, section by section as each is finished. Run again with the same
file, only sections that are not in it are measured, so an interrupted run can be resumed.

Needs the extra ``bench`` (TorchJD and its solvers).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import exact
import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import environment, prepare
from contestants import METHODS, Method

import jaxmoo
import report
from jaxmoo import aggregators
from jaxmoo.aggregators import Aggregator
from jaxmoo.aggregators.pcgrad import random_orders

SECTIONS = ("accuracy", "matrix", "blocks", "solves")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- Accuracy --------------------------------------------------------------------------------


def families(rng: np.random.Generator, k: int, n: int) -> dict[str, np.ndarray]:
    """One matrix [k, n] of every family, float32, rows linearly independent."""
    noise = rng.standard_normal((k, n))
    common = rng.standard_normal(n)
    spread = rng.permutation(np.geomspace(1, 1000, k))[:, None]
    # All pairs conflict, with cosines of -0.9 / (k - 1) on average.
    against = noise - (1 - 0.1**0.5) * noise.mean(0)
    made = {
        "random": noise,
        "correlated": common + 0.3 * noise,
        "conflicting": against,
        "imbalanced": noise * spread,
        "imbalanced conflicting": against * spread,
        "small": noise * 1e-3 / n**0.5,
    }
    return {name: matrix.astype(np.float32) for name, matrix in made.items()}


def compare_accuracy(draws: int, objectives: Sequence[int], n: int = 1000) -> list[dict]:
    """Errors of every code base on the same float32 matrices."""
    rows = []
    for method in METHODS:
        if method.exact is None:
            continue
        compiled = ours_on_matrix(method.ours)
        for k in objectives:
            rng = np.random.default_rng(k)
            for draw in range(draws):
                for family, matrix in families(rng, k, n).items():
                    for who, found, wanted in contestants(method, compiled, matrix, draw):
                        rows.append(
                            {"method": method.name, "k": k, "family": family, "draw": draw}
                            | {"who": who, **errors(found, wanted, matrix)}
                        )
        say(f"accuracy: {method.name}")
    return rows


def contestants(
    method: Method, compiled: Callable[..., Any], matrix: np.ndarray, draw: int
) -> Iterator[tuple[str, np.ndarray | None, np.ndarray]]:
    """Yield who, the update found (None after an error) and the exact one."""
    k = len(matrix)
    tensor = torch.from_numpy(matrix)
    key = jax.random.key(draw)
    solve = method.exact
    if method.name == "pcgrad":  # each with the orders that it draws itself
        ours = np.asarray(random_orders(jax.random.fold_in(key, 0), k)).tolist()
        torch.manual_seed(draw)
        theirs = [torch.randperm(k).tolist() for _ in range(k)]
        wanted = exact.update(solve, matrix, orders=ours)
        wanted_torch = exact.update(solve, matrix, orders=theirs)
    else:
        wanted = wanted_torch = exact.update(solve, matrix)
    yield "jaxmoo", np.asarray(compiled(matrix, key), np.float64), wanted
    torch.manual_seed(draw)
    yield "TorchJD", attempt(lambda: method.torchjd(k)(tensor)), wanted_torch
    if method.libmtl is not None:
        torch.manual_seed(draw)
        found = attempt(lambda: method.libmtl(tensor) / k**method.libmtl_sums)
        yield "LibMTL", found, wanted_torch


def attempt(call: Callable[[], torch.Tensor]) -> np.ndarray | None:
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        return call().double().numpy()
    return None


def errors(found: np.ndarray | None, wanted: np.ndarray, matrix: np.ndarray) -> dict:
    """Relative error of the update, and the smallest cosine between it and an objective."""
    if found is None or not np.isfinite(found).all():
        return {"error": float("inf"), "cosine": -1.0}
    j = matrix.astype(np.float64)
    length = np.linalg.norm(found)
    cosine = (j @ found / np.linalg.norm(j, axis=1)).min() / length if length else 0.0
    return {
        "error": float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)),
        "cosine": float(cosine),
    }


# --- Time ------------------------------------------------------------------------------------


def race(calls: dict[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, Any]:
    """Time every call once per round, in rotating order.

    Short calls are repeated within a measurement. A pause before each measurement lets the other
    library's worker threads, which wait actively for a while, go to sleep. A contestant that needs
    longer than the time budget for one call is not called again. LibMTL's formulas fail on some
    matrices; where they do, they are left out.
    """
    once: dict[str, float] = {}
    for name, call in list(calls.items()):
        try:
            for _ in range(2):  # the first compiles and allocates
                start = time.perf_counter()
                call()
                once[name] = time.perf_counter() - start
                if name != "jaxmoo" and once[name] > seconds:
                    break
        except (IndexError, ValueError, RuntimeError) as error:
            if name != "LibMTL":
                raise
            print(f"{name} failed: {error}", file=sys.stderr)
            once.pop(name, None)
    times = {name: [t] for name, t in once.items() if name != "jaxmoo" and t > seconds}
    names = [name for name in once if name not in times]
    repeats = {name: int(np.clip(0.003 / once[name], 1, 100)) for name in names}
    rounds = int(np.clip(seconds / sum(once[n] * repeats[n] for n in names), 3, rounds))
    times |= {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            time.sleep(0.005)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                calls[name]()
            times[name].append((time.perf_counter() - start) / repeats[name])
    others = [name for name in calls if name in times and name != "jaxmoo"]
    ratios = {name: np.divide(times[name], times["jaxmoo"]) for name in others}
    return {
        "rounds": rounds,
        "ms": {name: 1e3 * float(np.median(t)) for name, t in times.items()},
        "ratio": {name: float(np.median(r)) for name, r in ratios.items()},
        "spread": {name: np.percentile(r, [10, 90]).tolist() for name, r in ratios.items()},
    }


def gradients(key: jax.Array, k: int, n: int) -> jax.Array:
    """Gradients [k, n] with four common directions, cosines of both signs, norms from 1 to 10."""
    noise, common, mixing = jax.random.split(key, 3)
    shared = jax.random.normal(mixing, (k, 4)) @ jax.random.normal(common, (4, n))
    return jnp.geomspace(1, 10, k)[:, None] * (jax.random.normal(noise, (k, n)) + shared)


def ours_on_matrix(method: Aggregator) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Compiled: (matrix, key) to update."""
    return jax.jit(
        lambda j, key: aggregators.aggregate(method, j, key=key if method.stochastic else None)
    )


def time_matrices(sizes: Sequence[tuple[int, int]], rounds: int, seconds: float) -> list[dict]:
    rows = []
    for k, n in sizes:
        key = jax.random.key(k)
        j = jax.block_until_ready(jax.jit(gradients, static_argnums=(1, 2))(key, k, n))
        for method in METHODS:
            calls = matrix_calls(method, j, key)
            rows.append({"method": method.name, "k": k, "n": n, **race(calls, rounds, seconds)})
            say(f"matrix: K={k} n={n:.0e} {method.name} {rows[-1]['ratio']}")
    return rows


def matrix_calls(method: Method, j: jax.Array, key: jax.Array) -> dict[str, Callable[[], Any]]:
    k, n = j.shape
    tensor = torch.from_dlpack(j)  # the same memory
    ours, theirs = ours_on_matrix(method.ours), method.torchjd(k)
    calls = {
        "jaxmoo": lambda: ours(j, key).block_until_ready(),
        "TorchJD": lambda: quiet(theirs, tensor),
    }
    # LibMTL's PCGrad makes K^2 passes over the matrix: minutes at the largest sizes.
    if method.libmtl is not None and (method.name != "pcgrad" or k * k * n <= 1e9):
        calls["LibMTL"] = lambda: method.libmtl(tensor)
    return calls


def quiet(call: Callable[..., Any], *arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*arguments)


def time_blocks(k: int, n: int, blocks: int, rounds: int, seconds: float) -> list[dict]:
    """Many blocks in one call of ``resolve_conflicts``; the others take them one at a time."""
    keys = jax.random.split(jax.random.key(1), blocks)
    tree = {f"block{i}": gradients(key, k, n) for i, key in enumerate(keys)}
    jax.block_until_ready(tree)
    tensors = [torch.from_dlpack(x) for x in tree.values()]
    params = {name: jax.ShapeDtypeStruct((n,), jnp.float32) for name in tree}
    rows = []
    for method in METHODS:
        tx = jaxmoo.resolve_conflicts(method.ours, "leaf")
        state = tx.init(params)
        update = jax.jit(tx.update)
        theirs = method.torchjd(k)
        calls = {
            "jaxmoo": lambda f=update, s=state: jax.block_until_ready(f(tree, s)),
            "TorchJD": lambda f=theirs: [quiet(f, x) for x in tensors],
        }
        if method.libmtl is not None:
            calls["LibMTL"] = lambda f=method.libmtl: [f(x) for x in tensors]
        rows.append({"method": method.name, "k": k, "n": n, "blocks": blocks})
        rows[-1] |= race(calls, rounds, seconds)
        say(f"blocks: {method.name} {rows[-1]['ratio']}")
    return rows


def time_solves(
    objectives: Sequence[int], batches: Sequence[int], rounds: int, seconds: float
) -> list[dict]:
    """Gram matrices in, weights out."""
    rows = []
    for k in objectives:
        for blocks in batches:
            keys = jax.random.split(jax.random.key(2), blocks)
            j = jnp.stack([gradients(key, k, 1000) for key in keys])
            grams = jax.block_until_ready(jnp.einsum("bkn,bln->bkl", j, j))
            tensors = list(torch.from_dlpack(grams))
            for method in METHODS:
                if method.weighting is None:
                    continue
                solve = jax.jit(
                    lambda g, ours=method.ours: aggregators.weigh_blocks(
                        ours, g, key=jax.random.key(0)
                    )[0]
                )
                theirs = method.weighting(k)
                calls = {
                    "jaxmoo": lambda f=solve, g=grams: f(g).block_until_ready(),
                    "TorchJD": lambda f=theirs, t=tensors: [quiet(f, g) for g in t],
                }
                rows.append({"method": method.name, "k": k, "blocks": blocks})
                rows[-1] |= race(calls, rounds, seconds)
            say(f"solves: K={k} blocks={blocks}")
    return rows


def measure(section: str, options: argparse.Namespace) -> list[dict]:
    """Rows of one section."""
    quick = options.quick
    rounds, seconds = (3, 0.5) if quick else (options.rounds, options.seconds)
    objectives = (2, 4) if quick else (2, 4, 8, 16, 32)
    if section == "accuracy":
        return compare_accuracy(2 if quick else options.draws, objectives)
    if section == "matrix":
        lengths = (10_000,) if quick else (100_000, 10_000_000)
        return time_matrices([(k, n) for n in lengths for k in objectives], rounds, seconds)
    if section == "blocks":
        k, n, count = (4, 1000, 4) if quick else (8, 100_000, 32)
        return time_blocks(k, n, count, rounds, seconds)
    return time_solves(objectives, (1, 4) if quick else (1, 32), rounds, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    parser.add_argument(
        "--section", nargs="+", choices=SECTIONS, help="measure these, whether known or not"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU cores for every contestant")
    parser.add_argument("--rounds", type=int, default=15, help="most timing rounds per cell")
    parser.add_argument("--seconds", type=float, default=1.5, help="time budget per cell")
    parser.add_argument("--draws", type=int, default=6, help="matrices per family and K")
    parser.add_argument("--json", type=Path, help="the raw numbers: read, added to and written")
    options = parser.parse_args()

    prepare(options.threads)
    torch.set_num_threads(options.threads)

    packages = ("jax", "optax", "torch", "torchjd", "cvxpy", "quadprog", "numpy", "scipy")
    known: dict[str, dict] = {}
    if options.json and options.json.exists():
        known = json.loads(options.json.read_text())
    for section in options.section or [s for s in SECTIONS if s not in known]:
        load, start = os.getloadavg()[0], time.perf_counter()
        rows = measure(section, options)
        about = environment(options.threads, packages)
        about["load of the machine"] = f"{load:.2f} before, {os.getloadavg()[0]:.2f} after"
        about["duration"] = f"{time.perf_counter() - start:.0f} s"
        known[section] = {"about": about, "rows": rows}
        if options.json:
            options.json.write_text(json.dumps(known, indent=1))

    print(report.everything({s: known[s] for s in SECTIONS if s in known}))


if __name__ == "__main__":
    main()
