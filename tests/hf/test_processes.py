"""Two processes with four devices each load and save one model."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_models
from devices import run_python

PROGRAM = """
import sys
from pathlib import Path
import jax
address, number, source, out = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(number))
assert jax.process_count() == 2 and jax.device_count() == 8
from flax import nnx
from jaxmoo import mesh
from jaxmoo.errors import CheckpointError
from jaxmoo.hf import load_model, save_model
from jaxmoo.hf.weights import Weights

read, sizes = Weights.read, {}

def counted(self, name, index=()):
    value = read(self, name, index)
    sizes[name] = sizes.get(name, 0) + value.size
    return value

Weights.read = counted
grid = mesh.make_mesh(4, language=4, fsdp=2)
source, out = Path(source), Path(out)
model = load_model(
    source, param_dtype=None,
    shardings=lambda s: mesh.parameter_shardings(grid, s, stacked=r"^layers\\."),
)
kernel = model.layers["0"].mlp.up_proj.kernel
assert not kernel.get_value().is_fully_addressable
# Half of the model is this process's, and no more than that has been read.
assert sizes["model.layers.1.mlp.up_proj.weight"] == 48 * 80 // 2

def save(target, **options):
    try:
        save_model(model, target, source=source, **options)
        print("saved")
    except CheckpointError as error:
        print("refused:", error)

save(out, max_shard_bytes=40_000)
assert (out / "config.json").is_file()  # whichever process this is
save(out)
kernel.set_value(jax.jit(lambda x: x * 1e9)(kernel.get_value()))
save(out.with_name("overflow"), dtype="float16")
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """The directory where it happened, and what each process printed."""
    folder = tmp_path_factory.mktemp("processes")
    tiny_models.save("llama", folder / "source", dtype=torch.bfloat16)
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"

    def run(number: int) -> list[str]:
        arguments = ["-c", PROGRAM, address, number, folder / "source", folder / "out"]
        lines = run_python(arguments, devices=4).stdout.splitlines()
        return [line for line in lines if line.startswith(("saved", "refused"))]

    with ThreadPoolExecutor(2) as pool:
        return folder, list(pool.map(run, range(2)))


def test_what_is_saved_is_what_was_loaded(seen):
    folder, printed = seen
    assert [lines[0] for lines in printed] == ["saved", "saved"]
    files = sorted((folder / "out").glob("*.safetensors"))
    assert len(files) > 2
    found = {name: value for file in files for name, value in load_file(file).items()}
    expected = load_file(folder / "source" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_when_the_first_cannot_write_both_say_so(seen):
    _, printed = seen
    assert "is not an empty directory" in printed[0][1]
    assert printed[1][1] == "refused: the first process could not write the model; see its message"


def test_a_value_that_does_not_fit_is_an_error_in_both(seen):
    folder, printed = seen
    for lines in printed:
        assert "has values beyond the range of float16" in lines[2]
    assert sorted(p.name for p in folder.iterdir()) == ["out", "source"]
