"""What quantising a base costs, and whether `nf4` is what bitsandbytes calls so.

    python benchmarks/quantized.py seconds
    pip install bitsandbytes && python benchmarks/quantized.py bitsandbytes

The first counts the CPU time of all threads, which other processes on the machine hardly change.
The second counts codes, scales and dequantised values of a random matrix that differ, on a CPU, and
exits with 1 if a scale does, or more than one value in a million: weights between two levels may
fall to either, because bitsandbytes divides by scales.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from common import Pages, environment, markdown, prepare

from jaxmoo.kernels.quantized import BLOCK, KINDS, dequantize, quantize

DTYPES = ("float32", "bfloat16")


class Quantized(NamedTuple):
    """A matrix in nf4."""

    codes: np.ndarray  # [out, in], from 0 to 15
    scales: np.ndarray  # [out, blocks]
    values: np.ndarray  # [out, in] in the matrix's dtype


def random(size_out: int, size_in: int, dtype: str) -> np.ndarray:
    """A matrix [out, in], as files have it."""
    drawn = np.random.default_rng(0).standard_normal((size_out, size_in), np.float32)
    return drawn.astype(jnp.dtype(dtype))


def seconds(kind: str, dtype: str, size: int, repeats: int) -> dict[str, Any]:
    """The least CPU time of quantising a square matrix, as it is read from a file."""
    kernel, times = random(size, size, dtype).T, []
    for _ in range(repeats):
        begun = time.process_time_ns()
        quantize(kernel, kind)
        times.append(time.process_time_ns() - begun)
    return {"kind": kind, "dtype": dtype, "size": size, "ns per weight": min(times) / size**2}


def ours(weights: np.ndarray) -> Quantized:
    codes, scales = quantize(weights.T, "nf4")
    values = np.asarray(dequantize(codes, scales)).T.astype(weights.dtype)
    apart = np.concatenate([codes & 15, codes >> 4], 1)
    return Quantized(apart.reshape(weights.T.shape).T, scales.T, values)


def theirs(weights: np.ndarray) -> Quantized:
    """The same of bitsandbytes."""
    try:
        import bitsandbytes.functional as bnb
        import torch
    except ImportError as error:
        raise SystemExit(f"{error}: pip install bitsandbytes torch") from None
    matrix = torch.tensor(weights.astype(np.float32)).to(getattr(torch, weights.dtype.name))
    packed, state = bnb.quantize_4bit(
        matrix, blocksize=BLOCK, quant_type="nf4", compress_statistics=False
    )
    values = bnb.dequantize_4bit(packed, state).float().numpy().astype(weights.dtype)
    pairs = packed.reshape(-1).numpy()
    codes = np.stack([pairs >> 4, pairs & 15], 1).reshape(weights.shape)
    return Quantized(codes, state.absmax.float().numpy().reshape(len(weights), -1), values)


def differing(a: Quantized, b: Quantized) -> dict[str, int]:
    """How many codes, scales and values differ."""
    return {
        name: int((x != y).sum()) for name, x, y in zip(Quantized._fields, a, b, strict=True)
    } | {"weights": a.codes.size}


def differs(found: dict[str, int]) -> bool:
    """Whether that is more than rounding explains."""
    most = found["weights"] / 1e6
    return bool(found["scales"]) or max(found["codes"], found["values"]) > most


def report(rows: list[dict[str, Any]]) -> str:
    cells = [[f"{x:.1f}" if isinstance(x, float) else f"{x}" for x in row.values()] for row in rows]
    return markdown([list(rows[0]), *cells])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("seconds", "bitsandbytes"))
    parser.add_argument("--size", type=int, default=4096, help="inputs, and outputs (4096)")
    parser.add_argument("--repeats", type=int, default=5, help="of seconds (5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", help="file for the numbers")
    flags = parser.parse_args()
    prepare(flags.threads)
    pages = Pages(flags.json, environment(flags.threads, ["numpy", "jax", "torch", "bitsandbytes"]))
    wrong = False
    for dtype in DTYPES:
        if flags.what == "seconds":
            for kind in KINDS:
                pages.add(seconds(kind, dtype, flags.size, flags.repeats))
            continue
        weights = random(flags.size, flags.size, dtype)
        found = differing(ours(weights), theirs(weights))
        wrong |= differs(found)
        pages.add({"dtype": dtype} | found)
    print(pages.markdown(report))
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
