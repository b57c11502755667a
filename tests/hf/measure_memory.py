"""Measure the memory that loading and saving take, here and in transformers.

    python tests/hf/measure_memory.py [--layers 22] [--directory DIR]

Makes a random bfloat16 checkpoint with the sizes of a Llama of 1.1 billion parameters (2.2 GB) and
handles it in processes of their own. Printed are the peaks, polled, of the process's own memory
(Linux's RssAnon) and of that with the pages of mapped files (VmRSS), which the system can take
back, less what they were before; the parameters themselves are part of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxmoo.hf.names import hf_tensor
from jaxmoo.models import Decoder, DecoderConfig, logical_paths, named_leaves

ROOT = Path(__file__).parents[2]
SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}

POLL = """
import sys, threading, time
from pathlib import Path
source, out = Path(sys.argv[1]), Path(sys.argv[2])

def sizes():
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":") for line in lines)
    return [int(found[key].split()[0]) * 1024 / 1e9 for key in ("RssAnon", "VmRSS")]

peak, running = [0, 0], True

def poll():
    while running:
        peak[:] = map(max, peak, sizes())
        time.sleep(0.001)

def measured(name, action):
    global running
    before, peak[:], running = sizes(), sizes(), True
    thread = threading.Thread(target=poll)
    thread.start()
    result = action()
    running = False
    thread.join()
    own, mapped = (p - b for p, b in zip(peak, before))
    print(f"{name:<18} own {own:5.2f} GB, with mapped files {mapped:5.2f} GB")
    return result
"""
OURS = """
import jax, jax.numpy as jnp
from flax import nnx
from jaxmoo.hf import load_model, save_model
jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.ones(3)))
model = measured("jaxmoo load", lambda: load_model(source, param_dtype=None))
measured("jaxmoo save", lambda: save_model(model, out, source=source))
"""
CONVERT = """
import jax, jax.numpy as jnp
from jaxmoo.convert.models import from_hf, to_hf
jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.ones(3)))
from_checkpoint = source.name == "checkpoint"
name, convert = ("jaxmoo to-hf", to_hf) if from_checkpoint else ("jaxmoo from-hf", from_hf)
measured(name, lambda: convert(source, out, say=lambda _: None))
"""
THEIRS = """
import torch
from transformers import AutoModelForCausalLM
torch.ones(3) @ torch.ones(3)
load = lambda: AutoModelForCausalLM.from_pretrained(source, dtype="auto")
model = measured("transformers load", load)
measured("transformers save", lambda: model.save_pretrained(out))
"""


def make_checkpoint(directory: Path, layers: int) -> tuple[int, int]:
    """Write a random checkpoint; return its size and its largest tensor's, in bytes."""
    sizes = SIZES | {"num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(sizes))
    rng = np.random.default_rng(0)
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, leaf in named_leaves(nnx.state(Decoder.abstract(DecoderConfig.from_hf(sizes)))):
        shape = leaf.shape[1:] if path[0] == "layers" else leaf.shape
        for logical in logical_paths(path, leaf.shape):
            tensor = hf_tensor(logical)
            part = logical.split(".")[1] if path[0] == "layers" else path[0]
            file = files.setdefault(f"part-{part}.safetensors", {})
            file[tensor.name] = shape[::-1] if tensor.transposed else shape
    total, largest, weight_map = 0, 0, {}
    for file, shapes in files.items():
        # Bit patterns of numbers between 0 and 2.
        bits = {n: rng.integers(0, 0x4000, shape, np.uint16) for n, shape in shapes.items()}
        values = {name: value.view(ml_dtypes.bfloat16) for name, value in bits.items()}
        save_file(values, directory / file, metadata={"format": "pt"})
        total += sum(value.nbytes for value in values.values())
        largest = max(largest, *(value.nbytes for value in values.values()))
        weight_map |= dict.fromkeys(values, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total, largest


def main() -> None:
    """Make the checkpoint, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--directory", help="where to work (a temporary directory)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        source = Path(scratch) / "source"
        source.mkdir()
        total, largest = make_checkpoint(source, options.layers)
        print(f"checkpoint {total / 1e9:.2f} GB, largest tensor {largest / 1e9:.3f} GB", flush=True)
        checkpoint = Path(scratch) / "checkpoint"
        for number, (program, begin, end) in enumerate(
            [
                (OURS, source, None),
                (CONVERT, source, checkpoint),
                (CONVERT, checkpoint, None),
                (THEIRS, source, None),
            ]
        ):
            out = end or Path(scratch) / f"out{number}"
            arguments = [sys.executable, "-c", POLL + program, begin, out]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
            subprocess.run(arguments, cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    main()
