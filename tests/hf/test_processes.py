"""Two processes with four devices each load and save one model."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import tiny_models
from devices import run_python

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
from pathlib import Path
import jax
address, number, source, out = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(number))
assert jax.process_count() == 2 and jax.device_count() == 8
from flax import nnx
from jaxmoo import mesh
from jaxmoo.convert.models import from_hf, to_hf
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
for name in ("float32", "bfloat16"):
    place = out.parent / "round trips" / name
    from_hf(place / "source", place / "checkpoint", say=lambda _: None)
    size = 40_000 if name == "bfloat16" else 10**9
    to_hf(place / "checkpoint", place / "copy", max_shard_bytes=size, say=lambda _: None)

kernel.set_value(jax.jit(lambda x: x * 1e9)(kernel.get_value()))
save(out.with_name("overflow"), dtype="float16")
"""


NAMES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """The directory where it happened, and what each process printed."""
    folder = tmp_path_factory.mktemp("processes")
    tiny_models.make("llama").bfloat16().save_pretrained(folder / "source")
    for name in NAMES:
        model = getattr(tiny_models.make("qwen3"), name.replace("32", ""))()
        size = "40KB" if name == "bfloat16" else "1GB"
        model.save_pretrained(folder / "round trips" / name / "source", max_shard_size=size)
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"

    def run(number: int) -> list[str]:
        arguments = ["-c", PROGRAM, address, number, folder / "source", folder / "out"]
        lines = run_python(arguments, devices=4).stdout.splitlines()
        return [line for line in lines if line.startswith(("saved", "refused"))]

    with ThreadPoolExecutor(2) as pool:
        return folder, list(pool.map(run, range(2)))


def tensors(directory: Path) -> dict[str, tuple[np.dtype, bytes]]:
    """Every tensor of a directory as its dtype and its bytes."""
    return {
        name: (value.dtype, value.tobytes())
        for file in directory.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def test_what_is_saved_is_what_was_loaded(seen):
    folder, printed = seen
    assert [lines[0] for lines in printed] == ["saved", "saved"]
    assert len(list((folder / "out").glob("*.safetensors"))) > 2
    assert tensors(folder / "out") == tensors(folder / "source")


@pytest.mark.parametrize("name", NAMES)
def test_through_a_checkpoint_and_back_every_byte_is_the_same(seen, name):
    place = seen[0] / "round trips" / name
    assert sorted(p.name for p in place.iterdir()) == ["checkpoint", "copy", "source"]
    number = {p: len(list((place / p).glob("*.safetensors"))) for p in ("source", "copy")}
    if name == "bfloat16":
        assert min(number.values()) > 2
    else:
        weights = [place / p / "model.safetensors" for p in number]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    assert tensors(place / "copy") == tensors(place / "source")
    configs = [(place / p / "config.json").read_bytes() for p in number]
    assert configs[0] == configs[1]


def test_when_the_first_cannot_write_both_say_so(seen):
    _, printed = seen
    assert "is not an empty directory" in printed[0][1]
    assert printed[1][1] == "refused: the first process could not write the model; see its message"


def test_a_value_that_does_not_fit_is_an_error_in_both(seen):
    folder, printed = seen
    for lines in printed:
        assert "has values beyond the range of float16" in lines[2]
    assert sorted(p.name for p in folder.iterdir()) == ["out", "round trips", "source"]
