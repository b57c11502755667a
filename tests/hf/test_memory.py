"""Host memory of loading and saving: never more than two tensors beyond the model itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from devices import run_python
from jaxmoo.hf.names import hf_tensor
from jaxmoo.models import Decoder, DecoderConfig, logical_paths, named_leaves

CONFIG = {
    "model_type": "llama",
    "vocab_size": 6000,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A model of 99 MB in float16, in four files."""
    directory = tmp_path_factory.mktemp("large")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    rng = np.random.default_rng(0)
    files: list[dict[str, np.ndarray]] = [{}, {}, {}, {}]
    number = 0
    state = nnx.state(Decoder.abstract(DecoderConfig.from_hf(CONFIG)))
    for path, leaf in named_leaves(state):
        shape = leaf.shape[1:] if path[0] == "layers" else leaf.shape
        for logical in logical_paths(path, leaf.shape):
            tensor = hf_tensor(logical)
            value = rng.random(shape[::-1] if tensor.transposed else shape, np.float32)
            files[number % 4][tensor.name] = value.astype(np.float16)
            number += 1
    weight_map = {}
    for i, tensors in enumerate(files):
        save_file(tensors, directory / f"part{i}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"part{i}.safetensors")
    index = {"weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


# Python's and NumPy's allocations are traced; those of the devices, here also in this machine's
# memory, are not.
PROGRAM = """
import sys, tracemalloc
from pathlib import Path
import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxmoo.hf import load_model, save_model

source, out, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
mesh = jax.make_mesh((jax.device_count(),), ("x",))

def shardings(state):
    return jax.tree.map(lambda x: NamedSharding(mesh, P(*[None] * (x.ndim - 1), "x")), state)

tracemalloc.start()
model = load_model(
    source, param_dtype=None if dtype == "stored" else dtype,
    shardings=shardings if mesh.size > 1 else None,
)
leaves = jax.tree.leaves(nnx.state(model))
loading = tracemalloc.get_traced_memory()[1]
tracemalloc.reset_peak()
before = tracemalloc.get_traced_memory()[0]
save_model(model, out, source=source)
saving = tracemalloc.get_traced_memory()[1] - before
largest = max(x[0].nbytes if x.ndim == 3 else x.nbytes for x in leaves)
print(largest, loading, saving, sum(x.nbytes for x in leaves))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "dtype"), [(1, "float32"), (4, "stored")])
def test_the_host_holds_at_most_twice_the_largest_tensor(checkpoint, tmp_path, devices, dtype):
    done = run_python(["-c", PROGRAM, checkpoint, tmp_path / "out", dtype], devices=devices)
    largest, loading, saving, resident = map(int, done.stdout.split())
    assert resident == 50_270_720 * {"float32": 4, "stored": 2}[dtype]
    slack = 2_000_000  # Python's own objects
    assert loading <= 2 * largest + slack
    assert saving <= 2 * largest + slack
