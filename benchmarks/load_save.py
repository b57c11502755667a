"""Time and host memory of loading and saving, here and in transformers.

    python benchmarks/load_save.py [--layers 22] [--directory DIR] [--json FILE]

Makes a random bfloat16 checkpoint with the sizes of a Llama of 1.1 billion parameters (2.2 GB) and
handles it, each operation in a process of its own. Memory is the peak, polled, of the process's
own (Linux's RssAnon) and of that with the pages of mapped files (VmRSS), which the system can take
back, less what they were before. The parameters are part of what loading takes. Files were just
written, so reads come from the system's cache; writes end when the system has the bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Pages, environment, gigabytes, markdown, seconds

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
Action = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--width", type=int, default=SIZES["hidden_size"], help="hidden size")
    parser.add_argument("--rounds", type=int, default=1, help="repetitions of everything (1)")
    parser.add_argument("--only", nargs="*", default=list(OPERATIONS), choices=OPERATIONS)
    parser.add_argument("--directory", help="where to work (a temporary directory)")
    parser.add_argument("--json", help="file for the numbers")
    flags = parser.parse_args()
    packages = ["jax", "orbax-checkpoint", "safetensors", "transformers", "torch"]
    with tempfile.TemporaryDirectory(dir=flags.directory) as scratch:
        source = Path(scratch) / "source"
        source.mkdir()
        total, largest = make_checkpoint(source, flags.layers, flags.width)
        size = f"{total / 1e9:.3g} GB of bfloat16, largest tensor {largest / 1e9:.3g} GB"
        about = environment(os.cpu_count() or 1, packages) | {"checkpoint": size}
        pages = Pages(flags.json, about)
        for name in flags.only:
            found = [in_process(name, scratch, number) for number in range(flags.rounds)]
            middle = statistics.median(row["seconds"] for row in found)
            peaks = {key: max(row[key] for row in found) for key in ("own", "mapped")}
            pages.add({"name": name, "seconds": middle, "bytes": total, **peaks})
        print(pages.markdown(report))


def in_process(name: str, scratch: str, number: int) -> dict[str, float]:
    """Measure an operation in a process of its own."""
    command = [sys.executable, __file__, "--measure", name, scratch, str(number)]
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, scratch: str, number: str) -> None:
    """Prepare an operation, measure it, print what was found."""
    action = OPERATIONS[name](Path(scratch), number)
    before, peak, running = sizes(), sizes(), True

    def poll() -> None:
        while running:
            peak[:] = map(max, peak, sizes())
            time.sleep(0.001)

    thread = threading.Thread(target=poll)
    thread.start()
    begun = time.perf_counter()
    kept = action()
    took = time.perf_counter() - begun
    running = False
    thread.join()
    del kept
    own, mapped = (p - b for p, b in zip(peak, before, strict=True))
    print(json.dumps({"seconds": took, "own": own, "mapped": mapped}))


def sizes() -> list[int]:
    """Bytes of this process's own memory, and with mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return [int(found[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS")]


# --- Operations: each prepares itself, then returns what is measured ----------------------------


def load(scratch: Path, number: str) -> Action:
    import jax
    from flax import nnx

    from jaxmoo.hf import load_model

    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))

    def action() -> object:
        model = load_model(scratch / "source", param_dtype=None)
        jax.block_until_ready(nnx.state(model))
        return model

    return action


def save(scratch: Path, number: str) -> Action:
    from jaxmoo.hf import save_model

    model: Any = load(scratch, number)()
    return lambda: save_model(model, scratch / f"saved-{number}", source=scratch / "source")


def checkpoint(scratch: Path, number: str) -> Action:
    from flax import nnx

    from jaxmoo.runs.checkpoint import Checkpoints

    params = nnx.state(load(scratch, number)())

    def action() -> None:
        with Checkpoints(scratch / f"checkpoints-{number}", keep=1) as checkpoints:
            checkpoints.save(1, params)

    return action


def restore(scratch: Path, number: str) -> Action:
    import jax
    from flax import nnx

    from jaxmoo.hf.load import load_config, with_dtypes
    from jaxmoo.models import Decoder
    from jaxmoo.runs.checkpoint import Checkpoints

    config = load_config(scratch / "source")
    shapes = nnx.state(Decoder.abstract(config))
    shapes = with_dtypes(shapes, lambda _: "bfloat16", config)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)

    def action() -> object:
        with Checkpoints(scratch / f"checkpoints-{number}", keep=1) as checkpoints:
            return jax.block_until_ready(checkpoints.restore(1, like))

    return action


def from_hf(scratch: Path, number: str) -> Action:
    return converted("from_hf", scratch / "source", scratch / f"converted-{number}")


def to_hf(scratch: Path, number: str) -> Action:
    return converted("to_hf", scratch / f"converted-{number}", scratch / f"exported-{number}")


def converted(name: str, source: Path, out: Path) -> Action:
    import jax

    from jaxmoo.convert import models

    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
    return lambda: getattr(models, name)(source, out, say=lambda _: None)


def theirs_load(scratch: Path, number: str) -> Action:
    import torch
    from transformers import AutoModelForCausalLM

    torch.ones(3) @ torch.ones(3)
    return lambda: AutoModelForCausalLM.from_pretrained(scratch / "source", dtype="auto")


def theirs_load_and_copy(scratch: Path, number: str) -> Action:
    mapped = theirs_load(scratch, number)

    def action() -> object:
        model: Any = mapped()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model

    return action


def theirs_save(scratch: Path, number: str) -> Action:
    model: Any = theirs_load(scratch, number)()
    return lambda: model.save_pretrained(scratch / f"theirs-{number}")


OPERATIONS: dict[str, Callable[[Path, str], Action]] = {
    "jaxmoo load": load,
    "jaxmoo save": save,
    "Orbax save": checkpoint,
    "Orbax restore": restore,
    "jaxmoo `from-hf`, all of it": from_hf,
    "jaxmoo `to-hf`, all of it": to_hf,
    "transformers load": theirs_load,
    "transformers load, and copy": theirs_load_and_copy,
    "transformers save": theirs_save,
}


def make_checkpoint(directory: Path, layers: int, width: int) -> tuple[int, int]:
    """Write a random checkpoint; return its size and its largest tensor's, in bytes."""
    import ml_dtypes
    import numpy as np
    from flax import nnx
    from safetensors.numpy import save_file

    from jaxmoo.hf.names import hf_tensor
    from jaxmoo.models import Decoder, DecoderConfig, logical_paths, named_leaves

    config = SIZES | {"num_hidden_layers": layers, "hidden_size": width}
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, leaf in named_leaves(nnx.state(Decoder.abstract(DecoderConfig.from_hf(config)))):
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


def report(rows: list[dict[str, Any]]) -> str:
    table = [["operation", "s", "MB/s", "own memory, peak GB", "with mapped files GB"]]
    for row in rows:
        speed = f"{row['bytes'] / 1e6 / row['seconds']:,.0f}"
        memory = [gigabytes(row[key]) for key in ("own", "mapped")]
        table.append([row["name"], seconds(row["seconds"]), speed, *memory])
    return markdown(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        main()
