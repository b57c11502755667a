"""What is written for XLA's CPU backend alone, with and without it.

Three pieces: Gram matrices by slices on all cores, weighted sums as one elementwise pass, and
products of bfloat16 matrices in the form that a CPU's own instructions take, where it has any. Each
is timed beside the one contraction that it stands for, in alternation, and compiled beside it. The
last column is what counts for a run of so many steps: time without, over time with it, both with
their compilation.

    python benchmarks/cpu_kernels.py
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import Pages, environment, markdown, prepare, ratio

from jaxmoo.kernels import product as products
from jaxmoo.kernels.cpu_grams import grams_by_slices
from jaxmoo.kernels.reductions import section_grams, weighted_sum

K = 8
STEPS = 100
# Matrices of a layer of SmolLM2-135M.
LAYER = [(576, 576), (576, 192), (576, 192), (576, 576), *[(576, 1536)] * 3, (1, 576), (1, 576)]


class Piece(NamedTuple):
    name: str
    size: str
    given: Callable[..., Any]  # with it
    plain: Callable[..., Any]  # without
    arguments: tuple[Any, ...]


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return products.product(x, kernel, "cpu")


def pieces(entries: list[int]) -> Iterator[Piece]:
    random = np.random.default_rng(0)

    def draw(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape, np.float32), dtype)

    def whole(arrays: list[jax.Array]) -> list[jax.Array]:
        return section_grams(arrays, partitioned=True)

    def added(x: jax.Array, weights: jax.Array) -> jax.Array:
        return weighted_sum(x, weights, partitioned=False)

    def contracted(x: jax.Array, weights: jax.Array) -> jax.Array:
        return weighted_sum(x, weights, partitioned=True)

    weights = jnp.asarray(random.uniform(size=(1, K)), jnp.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        kind = jnp.dtype(dtype).name
        sizes = {f"{K} x {n:.0e}": [(n,)] for n in entries} | {f"{K} x a layer": LAYER}
        for size, shapes in sizes.items():
            arrays = [draw(K, 1, *shape, dtype=dtype) for shape in shapes]
            yield Piece("Gram by slices", f"{size}, {kind}", grams_by_slices, whole, (arrays,))
            if len(shapes) == 1:
                sums = (added, contracted, (*arrays, weights))
                yield Piece("weighted sum", f"{size}, {kind}", *sums)
    x, kernel = draw(512, 576, dtype=jnp.bfloat16), draw(576, 1536, dtype=jnp.bfloat16)
    ct = draw(512, 1536, dtype=jnp.bfloat16)
    size = "512 x 576 x 1536"
    yield Piece("bfloat16 product", size, product, jnp.matmul, (x, kernel))

    def gradients(of: Callable[..., jax.Array]) -> Callable[..., Any]:
        return lambda x, kernel, ct: jax.vjp(of, x, kernel)[1](ct)

    def by_language(of: Callable[..., jax.Array]) -> Callable[..., Any]:
        return jax.vmap(gradients(of), in_axes=(0, None, 0))

    rows, cts = (a.reshape(K, -1, a.shape[-1]) for a in (x, ct))
    pair = (gradients(product), gradients(jnp.matmul))
    yield Piece("bfloat16 product, gradients", size, *pair, (x, kernel, ct))
    pair = (by_language(product), by_language(jnp.matmul))
    yield Piece("bfloat16 product, gradients", "8 x 64 x 576 x 1536", *pair, (rows, kernel, cts))


def instructions() -> list[str]:
    """The processor's own for bfloat16."""
    text = ""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
    return [name for name in ("amx_bf16", "avx512_bf16") if name in text]


def compiled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, float]:
    """The program, and the seconds that compiling it took."""
    lowered = jax.jit(function).lower(*arguments)
    begun = time.perf_counter()
    return lowered.compile(), time.perf_counter() - begun


def measure(piece: Piece, seconds: float) -> dict[str, Any]:
    """Ratios without over with; medians of paired runs."""
    forms = (piece.given, piece.plain)
    built = [[compiled(form, piece.arguments) for form in forms] for _ in range(3)]
    compiling = [statistics.median(pair[i][1] for pair in built) for i in range(2)]
    programs = [program for program, _ in built[-1]]
    times: list[tuple[float, ...]] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        pair = []
        for program in programs:
            begun = time.perf_counter()
            jax.block_until_ready(program(*piece.arguments))
            pair.append(time.perf_counter() - begun)
        times.append(tuple(pair))
    running = [statistics.median(pair[i] for pair in times) for i in range(2)]
    total = [c + STEPS * r for c, r in zip(compiling, running, strict=True)]
    return {
        "piece": piece.name,
        "size": piece.size,
        "run": statistics.median(plain / given for given, plain in times),
        "compile": compiling[1] / compiling[0],
        "steps": total[1] / total[0],
    }


def report(rows: list[dict[str, Any]]) -> str:
    table = [["piece", "size", "run", "compile", f"{STEPS} steps"]]
    for row in rows:
        name, size, *ratios = row.values()
        table.append([name, size, *map(ratio, ratios)])
    return "Without / with; above 1 the piece pays.\n\n" + markdown(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--entries", type=int, nargs="*", default=[10**5, 10**6, 10**7])
    parser.add_argument("--pieces", default="", help="only those whose name contains this")
    parser.add_argument("--seconds", type=float, default=2.0, help="for every piece and size")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", help="file for the numbers")
    flags = parser.parse_args()
    prepare(flags.threads)
    jax.config.update("jax_enable_compilation_cache", False)
    about = environment(flags.threads, ["jax", "jaxlib"])
    pages = Pages(
        flags.json, about | {"bfloat16 instructions": ", ".join(instructions()) or "none"}
    )
    for piece in pieces(flags.entries):
        if flags.pieces in piece.name:
            pages.add(measure(piece, flags.seconds))
    print(pages.markdown(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
