"""Accuracy and speed of the aggregators, beside TorchJD 0.18 and LibMTL's formulas.

One process, the same matrices (shared memory, no copies), the same number of threads. Timings are
interleaved: in every round each contestant runs once, in rotating order, and ratios are formed
within a round. Prints Markdown; ``--json`` keeps the raw numbers.

    python benchmarks/aggregators.py                # about 15 minutes on two cores
    python benchmarks/aggregators.py --quick        # a minute, to see that everything runs

Needs the extra ``bench`` (TorchJD and its solvers).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

SECTIONS = ("accuracy", "matrix", "blocks", "solves")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--threads", type=int, default=2, help="CPU cores for every contestant")
    parser.add_argument("--rounds", type=int, default=15, help="most timing rounds per cell")
    parser.add_argument("--seconds", type=float, default=6.0, help="time budget per cell")
    parser.add_argument("--draws", type=int, default=20, help="matrices per family and K")
    parser.add_argument("--json", type=Path, help="where to write the raw numbers")
    return parser.parse_args()


ARGUMENTS = parse_arguments() if __name__ == "__main__" else argparse.Namespace(threads=2)
# XLA sizes its thread pool by the cores it may use, so this comes before its import.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: ARGUMENTS.threads])

import exact
import jax
import jax.numpy as jnp
import libmtl
import numpy as np
import torch
import torchjd.aggregation as torchjd

import jaxmoo
from jaxmoo import aggregators
from jaxmoo.aggregators import Aggregator
from jaxmoo.aggregators.pcgrad import random_orders

torch.set_num_threads(ARGUMENTS.threads)
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Method:
    """One method in every code base, all at the published scale.

    ``sums`` says that TorchJD sums where the paper averages or the reverse: its update is divided
    by K ** sums before comparison; ``libmtl_sums`` likewise.
    """

    name: str
    ours: Aggregator
    torchjd: Callable[[int], Any]
    exact: Callable[..., np.ndarray] | None = None
    libmtl: Callable[[torch.Tensor], torch.Tensor] | None = None
    libmtl_sums: int = 0
    weighting: Callable[[int], Any] | None = None
    non_conflicting: bool = False


METHODS = (
    Method("mean", aggregators.mean(), lambda k: torchjd.Mean(), None, lambda j: j.mean(0)),
    Method(
        "mgda",
        aggregators.mgda(),
        lambda k: torchjd.MGDA(),
        exact.mgda,
        libmtl.mgda,
        weighting=lambda k: torchjd.MGDAWeighting(),
        non_conflicting=True,
    ),
    Method(
        "cagrad",
        aggregators.cagrad(0.5, rescale="none"),
        lambda k: torchjd.CAGrad(0.5),
        exact.cagrad,
        libmtl.cagrad,
        weighting=lambda k: torchjd.CAGradWeighting(0.5),
    ),
    Method(
        "pcgrad",
        aggregators.pcgrad(reduction="sum"),
        lambda k: torchjd.PCGrad(),
        exact.pcgrad,
        libmtl.pcgrad,
        weighting=lambda k: torchjd.PCGradWeighting(),
    ),
    Method(
        "upgrad",
        aggregators.upgrad(),
        lambda k: torchjd.UPGrad(),
        exact.upgrad,
        weighting=lambda k: torchjd.UPGradWeighting(),
        non_conflicting=True,
    ),
    Method(
        "dualproj",
        aggregators.dualproj(),
        lambda k: torchjd.DualProj(),
        exact.dualproj,
        weighting=lambda k: torchjd.DualProjWeighting(),
        non_conflicting=True,
    ),
    Method(
        "imtl_g",
        aggregators.imtl_g(bound=1e6),
        lambda k: torchjd.IMTLG(),
        exact.imtl_g,
        libmtl.imtl_g,
        weighting=lambda k: torchjd.IMTLGWeighting(),
    ),
    Method(
        "aligned_mtl",
        aggregators.aligned_mtl(),
        lambda k: torchjd.AlignedMTL(),
        exact.aligned_mtl,
        libmtl.aligned_mtl,
        libmtl_sums=1,
        weighting=lambda k: torchjd.AlignedMTLWeighting(),
    ),
    Method(
        "config",
        aggregators.config(reduction="sum"),
        lambda k: torchjd.ConFIG(),
        exact.config,
        non_conflicting=True,
    ),
    Method(
        "nash_mtl",
        aggregators.nash_mtl(scale="published"),
        lambda k: torchjd.NashMTL(k),
        exact.nash_mtl,
        non_conflicting=True,
    ),
    Method(
        "fairgrad",
        aggregators.fairgrad(scale="published"),
        lambda k: torchjd.FairGrad(1.0),
        exact.fairgrad,
        libmtl.fairgrad,
        weighting=lambda k: torchjd.FairGradWeighting(1.0),
        non_conflicting=True,
    ),
)


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
        compiled = jax.jit(
            lambda j, key, ours=method.ours: aggregators.aggregate(
                ours, j, key=key if ours.stochastic else None
            )
        )
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
    key = jax.random.fold_in(KEY, draw)
    solve = method.exact
    assert solve is not None
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


def accuracy_report(rows: list[dict]) -> str:
    names = [m.name for m in METHODS if m.exact is not None]
    header = ["method", "jaxmoo median", "worst", "TorchJD median", "worst", "LibMTL median"]
    header += ["worst", "opposed: jaxmoo", "TorchJD", "LibMTL"]
    table = []
    for name in names:
        cells = [f"`{name}`"]
        opposed = []
        for who in ("jaxmoo", "TorchJD", "LibMTL"):
            mine = [r for r in rows if r["method"] == name and r["who"] == who]
            if not mine:
                cells += ["", ""]
                opposed.append("")
                continue
            error = np.array([r["error"] for r in mine])
            cells += [scientific(np.median(error)), scientific(error.max())]
            promise = next(m for m in METHODS if m.name == name).non_conflicting
            share = np.mean([r["cosine"] < -1e-3 for r in mine])
            opposed.append(f"{share:.1%}" if promise else "")
        table.append(cells + opposed)
    ours = [r for r in rows if r["who"] == "jaxmoo"]
    worst_by = [["family", *(f"K = {k}" for k in sorted({r["k"] for r in rows}))]]
    for family in dict.fromkeys(r["family"] for r in rows):
        line = [family]
        for k in sorted({r["k"] for r in rows}):
            cell = [r for r in ours if r["family"] == family and r["k"] == k]
            line.append(scientific(max(r["error"] for r in cell)))
        worst_by.append(line)
    return (
        markdown([header, *table])
        + "\n\nWorst error of jaxmoo over all methods:\n\n"
        + markdown(worst_by)
    )


# --- Time ------------------------------------------------------------------------------------


def race(calls: dict[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, Any]:
    """Time every call once per round, in rotating order.

    Short calls are repeated within a measurement. A pause before each measurement lets the other
    library's worker threads, which wait actively for a while, go to sleep.
    """
    once = {}
    for name, call in calls.items():
        call()  # compile, allocate
        start = time.perf_counter()
        call()
        once[name] = time.perf_counter() - start
    repeats = {name: int(np.clip(0.003 / t, 1, 100)) for name, t in once.items()}
    rounds = int(np.clip(seconds / sum(once[n] * r for n, r in repeats.items()), 3, rounds))
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            time.sleep(0.005)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                calls[name]()
            times[name].append((time.perf_counter() - start) / repeats[name])
    others = [name for name in names if name != "jaxmoo"]
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


def ours_on_matrix(method: Aggregator) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(
        lambda j: aggregators.aggregate(method, j, key=KEY if method.stochastic else None)
    )


def shared(array: jax.Array) -> torch.Tensor:
    """The same memory as a tensor."""
    return torch.from_dlpack(array)


def time_matrices(sizes: Sequence[tuple[int, int]], rounds: int, seconds: float) -> list[dict]:
    rows = []
    for k, n in sizes:
        j = jax.block_until_ready(jax.jit(gradients, static_argnums=(1, 2))(KEY, k, n))
        tensor = shared(j)
        for method in METHODS:
            compiled = ours_on_matrix(method.ours)
            theirs = method.torchjd(k)
            calls = {
                "jaxmoo": lambda f=compiled: f(j).block_until_ready(),
                "TorchJD": lambda f=theirs: quiet(f, tensor),
            }
            if method.libmtl is not None and (method.name != "pcgrad" or k * k * n <= 1e9):
                calls["LibMTL"] = lambda f=method.libmtl: f(tensor)
            rows.append({"method": method.name, "k": k, "n": n, **race(calls, rounds, seconds)})
            say(f"matrix: K={k} n={n:.0e} {method.name} {rows[-1]['ratio']}")
    return rows


def quiet(call: Callable[..., Any], *arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*arguments)


def time_blocks(k: int, n: int, blocks: int, rounds: int, seconds: float) -> list[dict]:
    """Many blocks in one call of ``resolve_conflicts``; the others take them one at a time."""
    keys = jax.random.split(jax.random.key(1), blocks)
    tree = {f"block{i}": gradients(key, k, n) for i, key in enumerate(keys)}
    jax.block_until_ready(tree)
    tensors = [shared(x) for x in tree.values()]
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
            tensors = list(shared(grams))
            for method in METHODS:
                if method.weighting is None:
                    continue
                solve = jax.jit(
                    lambda g, ours=method.ours: aggregators.weigh_blocks(ours, g, key=KEY)[0]
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


# --- Report ----------------------------------------------------------------------------------


def scientific(x: float) -> str:
    return "failed" if not np.isfinite(x) else f"{x:.0e}".replace("e-0", "e-")


def milliseconds(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 1 else f"{x:.2f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    align = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], align, *rows[1:]])


def ratio(row: dict, who: str) -> str:
    if who not in row["ratio"]:
        return ""
    low, high = row["spread"][who]
    return f"{row['ratio'][who]:.2g}× ({low:.2g}–{high:.2g})"


def matrix_report(rows: list[dict]) -> str:
    header = ["K", "n", "method", "jaxmoo ms", "TorchJD ms", "LibMTL ms"]
    table = [[*header, "TorchJD / jaxmoo", "LibMTL / jaxmoo"]]
    for row in rows:
        libmtl_ms = milliseconds(row["ms"]["LibMTL"]) if "LibMTL" in row["ms"] else ""
        table.append(
            [str(row["k"]), f"{row['n']:.0e}".replace("e+0", "e"), f"`{row['method']}`"]
            + [milliseconds(row["ms"]["jaxmoo"]), milliseconds(row["ms"]["TorchJD"]), libmtl_ms]
            + [ratio(row, "TorchJD"), ratio(row, "LibMTL")]
        )
    return markdown(table)


def blocks_report(rows: list[dict]) -> str:
    header = ["method", "jaxmoo ms", "TorchJD ms", "LibMTL ms"]
    table = [[*header, "TorchJD / jaxmoo", "LibMTL / jaxmoo"]]
    for row in rows:
        libmtl_ms = milliseconds(row["ms"]["LibMTL"]) if "LibMTL" in row["ms"] else ""
        table.append(
            [f"`{row['method']}`", milliseconds(row["ms"]["jaxmoo"])]
            + [milliseconds(row["ms"]["TorchJD"]), libmtl_ms]
            + [ratio(row, "TorchJD"), ratio(row, "LibMTL")]
        )
    return markdown(table)


def solves_report(rows: list[dict]) -> str:
    columns = sorted({(r["k"], r["blocks"]) for r in rows}, key=lambda c: (c[1], c[0]))
    table = [["method", *(f"K = {k}, {b} block{'s' * (b > 1)}" for k, b in columns)]]
    for name in dict.fromkeys(r["method"] for r in rows):
        line = [f"`{name}`"]
        for k, b in columns:
            row = next(r for r in rows if (r["method"], r["k"], r["blocks"]) == (name, k, b))
            line.append(f"{milliseconds(row['ms']['jaxmoo'])} ms, {row['ratio']['TorchJD']:.3g}×")
        table.append(line)
    return markdown(table)


def goals_report(results: dict[str, list[dict]]) -> str:
    """Every goal, with what was measured."""
    lines = []

    def judge(goal: str, rows: list[dict], least: float) -> None:
        if rows:
            worst = min(rows, key=lambda r: r["ratio"]["TorchJD"])
            value = worst["ratio"]["TorchJD"]
            missed = [r for r in rows if r["ratio"]["TorchJD"] < least]
            where = f"`{worst['method']}`, K = {worst['k']}"
            lines.append(
                f"- {goal}: {'met' if not missed else 'missed'}. Smallest ratio {value:.2f}× "
                f"({where}); {len(rows) - len(missed)} of {len(rows)} cells reach it."
            )

    accuracy = [r for r in results.get("accuracy", []) if r["who"] == "jaxmoo"]
    if accuracy:
        worst = max(accuracy, key=lambda r: r["error"])
        within = np.mean([r["error"] <= 1e-5 for r in accuracy])
        lines.append(
            f"- Error at most 1e-5 in float32: {'met' if worst['error'] <= 1e-5 else 'missed'}. "
            f"Worst {worst['error']:.1e} (`{worst['method']}`, {worst['family']}, K = "
            f"{worst['k']}); {within:.1%} of {len(accuracy)} updates reach it."
        )
    large = [r for r in results.get("matrix", []) if r["n"] == 10**7]
    judge("Never slower than TorchJD at n = 1e7", large, 1.0)
    blocks = [r for r in results.get("blocks", []) if r["n"] == 100_000]
    judge("At least 5 times faster over 32 blocks of 1e5 at K = 8", blocks, 5.0)
    solves = [r for r in results.get("solves", []) if r["blocks"] == 32]
    judge("At least 20 times faster for 32 solves alone", solves, 20.0)
    return "\n".join(lines)


def environment() -> dict[str, str]:
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    packages = ("jax", "optax", "torch", "torchjd", "cvxpy", "quadprog", "numpy", "scipy")
    return {
        "hardware": f"{cpu}, {ARGUMENTS.threads} threads of {os.cpu_count()} cores",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]
        ),
        "date": datetime.date.today().isoformat(),
        "command": "python " + shlex.join(sys.argv),
    }


def main() -> None:
    quick = ARGUMENTS.quick
    rounds, seconds = (3, 0.5) if quick else (ARGUMENTS.rounds, ARGUMENTS.seconds)
    objectives = (2, 4) if quick else (2, 4, 8, 16, 32)
    lengths = (10_000,) if quick else (100_000, 10_000_000)
    about = environment()
    about["load"] = f"{os.getloadavg()[0]:.2f} at the start"
    results: dict[str, list[dict]] = {}
    if "accuracy" in ARGUMENTS.sections:
        results["accuracy"] = compare_accuracy(2 if quick else ARGUMENTS.draws, objectives)
    if "matrix" in ARGUMENTS.sections:
        sizes = [(k, n) for n in lengths for k in objectives]
        results["matrix"] = time_matrices(sizes, rounds, seconds)
    if "blocks" in ARGUMENTS.sections:
        k, n, count = (4, 1000, 4) if quick else (8, 100_000, 32)
        results["blocks"] = time_blocks(k, n, count, rounds, seconds)
    if "solves" in ARGUMENTS.sections:
        results["solves"] = time_solves(objectives, (1, 4) if quick else (1, 32), rounds, seconds)
    about["load"] += f", {os.getloadavg()[0]:.2f} at the end"
    reports = {
        "accuracy": ("Accuracy", accuracy_report),
        "matrix": ("One matrix [K, n] to one update [n]", matrix_report),
        "blocks": ("Many blocks in one call", blocks_report),
        "solves": ("Solves alone: Gram matrices to weights", solves_report),
    }
    print("\n".join(f"- {name}: {text}" for name, text in about.items()))
    print(f"\n### Goals\n\n{goals_report(results)}")
    for section, rows in results.items():
        title, report = reports[section]
        print(f"\n### {title}\n\n{report(rows)}")
    if ARGUMENTS.json:
        ARGUMENTS.json.write_text(json.dumps({"environment": about, **results}, indent=1))


if __name__ == "__main__":
    main()
