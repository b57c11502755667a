"""The small convex programs: jaxmoo's solver beside qpax, optimistix and optax.

The same float32 Gram matrices for all, as batches under ``jit`` and ``vmap``. Residuals are the
largest violation of the optimality conditions, in float64, relative to the terms that cancel in
them, ``|g_i| sum_j |w_j| |g_j|``: rounding G to float32 alone leaves about 1e-7. Times are medians
of calls that take all methods in turn. Prints Markdown; takes about two minutes.

    python benchmarks/solvers.py

Needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
import qpax
from common import bullets, environment, markdown, milliseconds, prepare, scientific

from jaxmoo.aggregators import solvers
from jaxmoo.kernels.linear import matvec

PACKAGES = ("jax", "optax", "optimistix", "qpax", "numpy")

# --- Problems --------------------------------------------------------------------------------


def families(rng: np.random.Generator, k: int, n: int) -> dict[str, list[np.ndarray]]:
    """Matrices [k, n] by how hard they are."""
    noise = rng.standard_normal((k, n))
    correlated = rng.standard_normal(n) + 0.3 * rng.standard_normal((k, n))
    low_rank = rng.standard_normal((k, k // 2)) @ rng.standard_normal((k // 2, n))
    signs = np.where(np.arange(k) % 2, -1.0, 1.0)[:, None]
    opposed = signs * rng.standard_normal(n) + 0.05 * rng.standard_normal((k, n))
    spread = rng.permutation(np.geomspace(1, 1000, k))[:, None]
    return {
        "well-conditioned": [noise, correlated],
        "norms 1 to 1000": [noise * spread, correlated * spread],
        "degenerate": [low_rank, low_rank * spread, np.repeat(noise[::2], 2, axis=0), opposed],
    }


def draw(k: int, count: int) -> dict[str, np.ndarray]:
    """So many matrices of every family, [count, k, 2k + 8], exact in float32."""
    rng = np.random.default_rng(k)
    made: dict[str, list[np.ndarray]] = {}
    while not made or min(map(len, made.values())) < count:
        for family, matrices in families(rng, k, 2 * k + 8).items():
            made.setdefault(family, []).extend(matrices)
    stacks = {family: np.stack(matrices[:count]) for family, matrices in made.items()}
    return {name: x.astype(np.float32).astype(np.float64) for name, x in stacks.items()}


# --- The shortest vector of the hull ---------------------------------------------------------

Solver = Callable[[jax.Array], jax.Array]


def hull_jaxmoo(gram: jax.Array) -> jax.Array:
    return solvers.min_norm(gram, jnp.ones(gram.shape[0], bool))


def hull_qpax(gram: jax.Array) -> jax.Array:
    """As the program is written down: ``min w^T G w`` over the simplex."""
    k = gram.shape[0]
    solution = qpax.solve_qp(
        gram, jnp.zeros(k), jnp.ones((1, k)), jnp.ones(1), -jnp.eye(k), jnp.zeros(k)
    )
    return normalised(solution[0])


def equilibrated(gram: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Our form of the program: ``min z^T C z / 2 - b^T z`` over ``z >= 0``, ``w = z / |g|``."""
    cosine, norm = solvers.equilibrate(gram, jnp.ones(gram.shape[0], bool))
    lower = jnp.min(norm) / norm
    unit = lower / jnp.linalg.norm(lower)
    return cosine + unit[:, None] * unit[None, :], lower, norm


def hull_qpax_equilibrated(gram: jax.Array) -> jax.Array:
    curvature, lower, norm = equilibrated(gram)
    return normalised(qpax_above_zero(curvature, -lower) / norm)


def qpax_above_zero(curvature: jax.Array, linear: jax.Array) -> jax.Array:
    k = linear.shape[0]
    nothing = jnp.zeros((0, k)), jnp.zeros(0)
    return jnp.maximum(
        qpax.solve_qp(curvature, linear, *nothing, -jnp.eye(k), jnp.zeros(k))[0], 0.0
    )


def hull_optimistix(gram: jax.Array) -> jax.Array:
    """Levenberg-Marquardt on the Fischer-Burmeister equations, for want of a QP solver."""
    curvature, lower, norm = equilibrated(gram)
    k = gram.shape[0]

    def equations(z, _):
        s = matvec(curvature, z) - lower
        return jnp.sqrt(z * z + s * s + 1e-14) - z - s

    solver = optimistix.LevenbergMarquardt(rtol=1e-6, atol=1e-7)
    start = jnp.full(k, k**-0.5)
    solution = optimistix.root_find(equations, solver, start, max_steps=100, throw=False)
    return normalised(solution.value / norm)


def hull_optax(gram: jax.Array, steps: int = 250) -> jax.Array:
    """Accelerated projected gradients with ``optax.projections.projection_simplex``."""
    k = gram.shape[0]
    largest = jnp.linalg.norm(gram, ord=2)

    def step(_, carry):
        w, ahead, t = carry
        new = optax.projections.projection_simplex(ahead - matvec(gram, ahead) / largest)
        later = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
        return new, new + (t - 1) / later * (new - w), later

    start = jnp.full(k, 1 / k)
    return jax.lax.fori_loop(0, steps, step, (start, start, jnp.ones(())))[0]


def hull_frank_wolfe(gram: jax.Array, steps: int = 100) -> jax.Array:
    """What published MGDA code does."""
    k = gram.shape[0]

    def step(_, w):
        towards = matvec(gram, w)
        best = jnp.argmin(towards)
        ours, mixed, theirs = jnp.dot(w, towards), towards[best], gram[best, best]
        share = (ours - mixed) / jnp.maximum(ours + theirs - 2 * mixed, 1e-30)
        share = jnp.where(theirs <= mixed, 1.0, jnp.where(ours <= mixed, 0.0, share))
        return (1 - share) * w + share * jax.nn.one_hot(best, k)

    return jax.lax.fori_loop(0, steps, step, jnp.full(k, 1 / k))


def normalised(w: jax.Array) -> jax.Array:
    w = jnp.maximum(w, 0.0)
    return w / jnp.sum(w)


def hull_residual(stack: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Violation of ``<g_i, d> >= |d|^2``."""
    norm = np.linalg.norm(stack, axis=2)
    d = np.einsum("mk,mkn->mn", w, stack)
    short = (d**2).sum(1)[:, None] - np.einsum("mkn,mn->mk", stack, d)
    return (np.maximum(short, 0) / norm).max(1) / (w * norm).sum(1)


# --- Projections on the dual cone: K programs per block --------------------------------------


def cone_jaxmoo(gram: jax.Array) -> jax.Array:
    k = gram.shape[0]
    active = jnp.ones(k, bool)
    cosine, _ = solvers.equilibrate(gram, active)
    return jax.vmap(lambda e: solvers.project_on_dual_cone(cosine, active, e))(jnp.eye(k))


def cone_qpax_equilibrated(gram: jax.Array) -> jax.Array:
    k = gram.shape[0]
    cosine, _ = solvers.equilibrate(gram, jnp.ones(k, bool))
    return jax.vmap(lambda e: qpax_above_zero(cosine, matvec(cosine, e)))(jnp.eye(k))


def cone_residual(stack: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Violation of ``<g_i, d> >= 0``, and of ``z_i <g_i, d> = 0``."""
    unit = stack / np.linalg.norm(stack, axis=2)[:, :, None]
    weights = z + np.eye(z.shape[1])
    products = np.einsum("mrn,mkn->mrk", np.einsum("mrk,mkn->mrn", weights, unit), unit)
    off = np.maximum(-products, np.minimum(z, np.maximum(products, 0)))
    return (off / weights.sum(2, keepdims=True)).max((1, 2))


# --- CAGrad: not a quadratic program ---------------------------------------------------------


def ball_jaxmoo(gram: jax.Array) -> jax.Array:
    k = gram.shape[0]
    return solvers.best_worst_case(gram, jnp.ones(k, bool), jnp.full(k, 1 / k), 0.5)


def ball_residual(stack: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Violation of the ball, and of ``<g_i, d> >= m``, equal where ``y_i > 0``, at the best m."""
    norm = np.linalg.norm(stack, axis=2)
    mean, change = stack.mean(1), np.einsum("mk,mkn->mn", y, stack)
    size = ((1 / y.shape[1] + y) * norm).sum(1)
    products = np.einsum("mkn,mn->mk", stack, mean + change)
    low, high = products.min(1), products.max(1)
    for _ in range(60):  # violations grow with m, slackness falls
        middle = (low + high) / 2
        slack = (products - middle[:, None]) / norm
        off = np.maximum(-slack, 0).max(1)
        loose = np.minimum(y * norm, np.maximum(slack, 0)).max(1)
        low, high = np.where(off < loose, middle, low), np.where(off < loose, high, middle)
    outside = abs((change**2).sum(1) - 0.25 * (mean**2).sum(1)) / size**2
    return np.maximum(np.maximum(off, loose) / size, outside)


PROBLEMS: dict[str, tuple[Callable[..., np.ndarray], dict[str, Solver]]] = {
    "Shortest vector of the hull (`mgda`)": (
        hull_residual,
        {
            "jaxmoo": hull_jaxmoo,
            "qpax": hull_qpax,
            "qpax, equilibrated": hull_qpax_equilibrated,
            "optimistix, equilibrated": hull_optimistix,
            "optax projection, 250 steps": hull_optax,
            "Frank-Wolfe, 100 steps": hull_frank_wolfe,
        },
    ),
    "Projections on the dual cone, K per block (`upgrad`)": (
        cone_residual,
        {"jaxmoo": cone_jaxmoo, "qpax, equilibrated": cone_qpax_equilibrated},
    ),
    "Best worst case in a ball (`cagrad`, c = 0.5)": (ball_residual, {"jaxmoo": ball_jaxmoo}),
}


def compare(
    residual: Callable[..., np.ndarray],
    contestants: dict[str, Solver],
    stack: np.ndarray,
    rounds: int,
) -> dict[str, tuple[float, float, float]]:
    """Median and largest residual and milliseconds per batch, by contestant."""
    longest = np.linalg.norm(stack, axis=2).max(1)
    stack = stack / longest[:, None, None]
    grams = jnp.asarray(np.einsum("mkn,mln->mkl", stack, stack), jnp.float32)
    compiled = {name: jax.jit(jax.vmap(solve)) for name, solve in contestants.items()}
    found = {name: np.asarray(solve(grams), np.float64) for name, solve in compiled.items()}
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(rounds):
        for name, solve in compiled.items():
            start = time.perf_counter()
            solve(grams).block_until_ready()
            times[name].append(1e3 * (time.perf_counter() - start))
    measured = {}
    for name, solution in found.items():
        off = residual(stack, solution)
        off = np.where(np.isfinite(off), off, np.inf)
        measured[name] = float(np.median(off)), float(off.max()), float(np.median(times[name]))
    return measured


def show(middle: float, worst: float, ms: float) -> str:
    return f"{scientific(worst)} ({scientific(middle)}), {milliseconds(ms)} ms"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objectives", type=int, nargs="+", default=[8, 32], help="values of K")
    parser.add_argument("--blocks", type=int, default=32, help="matrices in a batch")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each method")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores for every contestant")
    options = parser.parse_args()
    prepare(options.threads)
    print(bullets(environment(options.threads, PACKAGES)))
    for title, (residual, contestants) in PROBLEMS.items():
        print(f"\n{title}: largest residual (median), ms for {options.blocks} blocks\n")
        table = [["K", "solver", *draw(2, 1)]]
        for k in options.objectives:
            stacks = draw(k, options.blocks)
            columns = {
                family: compare(residual, contestants, stack, options.rounds)
                for family, stack in stacks.items()
            }
            for name in contestants:
                cells = [columns[family][name] for family in stacks]
                table.append([str(k), name, *(show(*cell) for cell in cells)])
            print(f"K = {k}: {title}", file=sys.stderr, flush=True)
        print(markdown(table))


if __name__ == "__main__":
    main()
