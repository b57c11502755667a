"""What both sides of peers.py share: flags, weights and tokens that both can make, the protocol.

No library but NumPy is imported here, so that a process has only its own framework in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LEARNING_RATE = 1e-3


def parser(description: str) -> argparse.ArgumentParser:
    """Flags of peers.py and of the processes it starts."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", default="SmolLM2-135M", help="published model or directory")
    made.add_argument("--layers", type=int, help="another number of layers than the model's")
    made.add_argument("--languages", type=int, default=8)
    made.add_argument("--batch-size", type=int, default=1, help="examples per language (1)")
    made.add_argument("--sequence-length", type=int, default=128, help="tokens (128)")
    made.add_argument("--dtype", default="float32", help="precision of the computation")
    made.add_argument(
        "--remat", default="none", help="full: the backward pass computes layers again, everywhere"
    )
    made.add_argument("--method", default="upgrad", help="mean, mgda, upgrad or dualproj")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--platform", default="cpu", choices=["cpu", "gpu"])
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    made.add_argument("--json", help="file for the numbers")
    return made


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The random parameter of this Hugging Face name, the same in every process."""
    if "norm" in name:
        return np.ones(shape, np.float32)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape, np.float32) * np.float32(0.02)


def tokens(flags: argparse.Namespace, number: int, vocabulary: int) -> np.ndarray:
    """Tokens of a step, int32 [K, B, S]; each language keeps to its own part of the vocabulary."""
    k = flags.languages
    rng = np.random.default_rng(number)
    part = rng.integers(0, vocabulary // k, (k, flags.batch_size, flags.sequence_length))
    return (part + np.arange(k)[:, None, None] * (vocabulary // k)).astype(np.int32)


def memory_now() -> int:
    """Bytes of this process's memory that are in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def serve(
    step: Callable[[int], tuple[float, float, np.ndarray]],
    base: int,
    device_peak: Callable[[], int | None],
) -> None:
    """Run steps when told to, one line of JSON each.

    Args:
      step: ``number -> (seconds, seconds of all cores together, losses [K])``.
      base: bytes in use before model and optimiser were made.
      device_peak: most bytes used on the accelerator; None without one.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    for number, _ in enumerate(sys.stdin):
        seconds, cpu, losses = step(number)
        peak = device_peak()
        if peak is None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - base
        answer: dict[str, Any] = {"seconds": seconds, "cpu": cpu, "peak": peak}
        answer["losses"] = losses.tolist()
        print(json.dumps(answer), file=answers, flush=True)
