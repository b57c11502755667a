"""A step of jaxmoo beside the same step in PyTorch: plain, TorchJD, and a loop over buckets.

    python benchmarks/peers.py --json peers.json
    python benchmarks/peers.py --platform gpu --model Qwen3-0.6B --dtype bfloat16 --remat full

All have the same model, weights, tokens, AdamW and threads, each in a process of its own, which
says how much memory it took. Two run at a time, in turn: the step with conflicts resolved in the
backward pass, and one other; times are divided within a round. Pairs in one row do the same
mathematics, and their losses over the first steps are compared; the exit code is 1 when they
differ.

| jaxmoo | PyTorch | |
|---|---|---|
| plain | plain | transformers' model, one batch |
| stacked, `whole` | TorchJD | `backward` and `jac_to_grad`: one aggregation of the whole model |
| stacked, `whole` | TorchJD by rows | the same, of rows made by ordinary backward passes |
| backward, `layer` | buckets | one per layer, in hooks of the backward pass |

Needs torch, transformers and torchjd.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peer_common
import programs
from common import Pages, environment, gigabytes, markdown, quartiles, ratio, seconds
from programs import Kind

from jaxmoo.models import DecoderConfig

HERE = Path(__file__).parent
OURS = {"jaxmoo plain": "plain", "jaxmoo backward": "backward", "jaxmoo stacked": "stacked"}
THEIRS = {
    "PyTorch plain": "plain",
    "TorchJD": "torchjd",
    "TorchJD by rows": "torchjd-rows",
    "PyTorch buckets": "buckets",
}
BASE = "jaxmoo backward"
SAME = {
    "PyTorch plain": "jaxmoo plain",
    "TorchJD": "jaxmoo stacked",
    "TorchJD by rows": "jaxmoo stacked",
    "PyTorch buckets": "jaxmoo backward",
}
# Of the losses: in float32 the frameworks add up in other orders, and TorchJD's solvers stop
# earlier than ours; in bfloat16 every product is rounded.
TOLERANCE = {"float32": 2e-3, "bfloat16": 3e-2}


class Contestant:
    """A process that runs steps when told to."""

    def __init__(self, name: str, flags: argparse.Namespace, config: Path) -> None:
        self.name, self.losses, self.peak = name, [], 0
        script = "peer_jax.py" if name in OURS else "peer_torch.py"
        command = [sys.executable, HERE / script, "--contestant", (OURS | THEIRS)[name]]
        for flag, value in vars(flags).items():
            if value is not None and flag not in ("only", "json"):
                command += [f"--{flag.replace('_', '-')}", value]
        if name in THEIRS:
            command += ["--config", config, "--vocabulary-slices", vocabulary_slices(flags)]
        # A process whose turn it is not must not spin, waiting for work.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
        environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def step(self) -> tuple[float, float]:
        """Run a step; return its seconds, by the clock and of all cores together."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or "null")
        except BrokenPipeError:
            answer = None
        if answer is None:
            raise RuntimeError(f"{self.name} ended: exit code {self.process.wait()}")
        self.losses.append(answer["losses"])
        self.peak = answer["peak"]
        return answer["seconds"], answer["cpu"]

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def main() -> int:
    parser = peer_common.parser(__doc__.split("\n")[0])
    others = [name for name in OURS | THEIRS if name != BASE]
    parser.add_argument("--only", nargs="*", default=others, choices=others, metavar="NAME")
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # the accelerator is for the contestants
    names = ["jax", "torch", "transformers", "torchjd"]
    pages = Pages(flags.json, environment(flags.threads, names) | described(flags))
    first: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "config.json"
        config.write_text(json.dumps(hf_config(shape(flags))))
        with Contestant(BASE, flags, config) as base:
            for name in flags.only:
                try:
                    with Contestant(name, flags, config) as other:
                        row = beside(base, other, flags.rounds)
                        first[name] = np.array(other.losses[: flags.rounds + 1])
                except RuntimeError as error:
                    row = {"name": name, "failed": str(error)}
                pages.add(row)
            first[BASE] = np.array(base.losses[: flags.rounds + 1])
            mine = [second for row in pages.rows for second in row.get("base seconds", [])]
            if mine:
                pages.add({"name": BASE, "seconds": statistics.median(mine), "peak": base.peak})
    for name, same in SAME.items():
        if name in first and same in first:
            found = difference(first[name], first[same])
            pages.add({"name": name, "same": same, "difference": found})
    print(pages.markdown(report))
    wrong = disagreements(pages.rows, TOLERANCE[flags.dtype])
    for text in wrong:
        print(f"error: {text}", file=sys.stderr)
    return int(bool(wrong))


def described(flags: argparse.Namespace) -> dict[str, str]:
    return {
        "step": f"{flags.model}, {flags.layers or 'all'} layers, {flags.dtype}, {flags.languages} "
        f"languages x {flags.batch_size} x {flags.sequence_length} tokens, {flags.method}, "
        f"AdamW, recomputed: {flags.remat}, {flags.platform}"
    }


def shape(flags: argparse.Namespace) -> DecoderConfig:
    return programs.shape(argparse.Namespace(model=flags.model, untied=False), flags.layers)


def hf_config(model: DecoderConfig) -> dict[str, Any]:
    """The model's sizes as transformers reads them."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    odd = model.rope_scaling is not None or model.sliding_window is not None
    if odd or model.family not in ("llama", "qwen2", "qwen3"):
        raise SystemExit(f"expected a model with plain RoPE and attention, found {model}")
    kind = "qwen3" if model.qk_norm else "qwen2" if model.attention_bias else "llama"
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    same += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    same += ("rms_norm_eps", "tie_word_embeddings")
    return {"model_type": kind, "rope_parameters": rope} | {n: getattr(model, n) for n in same}


def vocabulary_slices(flags: argparse.Namespace) -> int:
    """Into how many blocks the engine cuts a table of the vocabulary."""
    from peer_jax import settings

    kind = Kind("backward", flags.method, "layer")
    step = programs.step(settings(flags), flags.languages, flags.layers, kind)
    names = step.gradients.partition.names
    return sum(name.startswith("embed_tokens") for name in names)


def beside(base: Contestant, other: Contestant, rounds: int) -> dict[str, Any]:
    """Time two in turn."""
    pairs = []
    for number in range(rounds + 1):
        times = {c.name: c.step() for c in ((base, other) if number % 2 else (other, base))}
        pairs.append((times[base.name], times[other.name]))
    timed = pairs[1:]  # the first round warms up
    low, middle, high = quartiles([theirs[0] / mine[0] for mine, theirs in timed])
    return {
        "name": other.name,
        "seconds": statistics.median(theirs[0] for _, theirs in timed),
        "base seconds": [mine[0] for mine, _ in timed],
        "ratio": middle,
        "spread": [low, high],
        "cpu ratio": statistics.median(theirs[1] / mine[1] for mine, theirs in timed),
        "peak": other.peak,
    }


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest relative difference of losses [steps, K]; plain steps have one loss, the mean."""
    if found.shape[1] != expected.shape[1]:
        found, expected = (x.mean(1) for x in (found, expected))
    return float(np.abs(found / expected - 1).max())


def disagreements(rows: list[dict[str, Any]], tolerance: float) -> list[str]:
    """What is wrong with the losses of contestants that should compute the same."""
    return [
        f"losses of {row['name']} and {row['same']} differ by {row['difference']:.1e} of their "
        f"size, more than {tolerance:.0e}"
        for row in rows
        if "same" in row and not row["difference"] <= tolerance
    ]


def report(rows: list[dict[str, Any]]) -> str:
    table = [["step", "s", "of jaxmoo backward", "quartiles", "CPU time"]]
    table[0].append("own memory, peak GB")
    timed = [row for row in rows if "same" not in row]
    for row in sorted(timed, key=lambda row: row["name"] != BASE):
        low, high = row.get("spread", (1, 1))
        table.append(
            [
                row["name"],
                row.get("failed") or seconds(row["seconds"]),
                ratio(row.get("ratio")),
                f"{low:.2f}–{high:.2f}" if "spread" in row else "",
                ratio(row.get("cpu ratio")),
                gigabytes(row.get("peak")),
            ]
        )
    agree = [
        f"Losses of {row['name']} and {row['same']} differ by at most {row['difference']:.1e}."
        for row in rows
        if "same" in row
    ]
    return "\n\n".join([markdown(table), *agree])


if __name__ == "__main__":
    raise SystemExit(main())
