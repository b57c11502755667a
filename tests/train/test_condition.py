"""Weights that are no numbers, or do not change, are told of by name."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import load_file, save_file

from jaxmoo.commands.train import main
from jaxmoo.errors import CheckpointError
from jaxmoo.train.condition import check_finite, examine, largest, unchanged

HERE = SingleDeviceSharding(jax.devices()[0])
QUICK = ["report=false", "tensorboard=false", "export=false", "data.unseen=[]", "train.steps=2"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_arrays_are_known_by_their_layer(dtype):
    layers = {"22": {"kernel": jnp.ones((3, 2, 2), dtype), "count": jnp.arange(3)}}
    tree = {"layers": layers, "norm": jnp.full(2, -4, dtype), "none": jnp.zeros((0, 2), dtype)}
    found = examine(tree, HERE)
    assert set(found) == {*(f"layers.{i}.kernel" for i in (22, 23, 24)), "norm"}
    assert largest(found) == "the largest weight is 4, in norm"
    check_finite(found, "It", "Mend it.")
    assert unchanged(found, examine(jax.tree.map(jnp.array, tree), HERE))
    kernel = layers["22"]["kernel"]
    layers["22"]["kernel"] = kernel.at[1, 0, 1].set(jnp.nextafter(kernel, 2 * kernel)[0, 0, 0])
    assert not unchanged(found, examine(tree, HERE))
    layers["22"]["kernel"] = kernel.at[1, 0, 1].set(jnp.nan)
    with pytest.raises(CheckpointError, match=r"It cannot .*: layers\.23\.kernel hold.*Mend it"):
        check_finite(examine(tree, HERE), "It", "Mend it.")


def changed_model(tiny_model, path, name, value):
    """The tiny model with another value in the middle of one tensor."""
    shutil.copytree(tiny_model, path)
    weights = load_file(path / "model.safetensors")
    weights[name] = np.array(weights[name])
    weights[name].flat[weights[name].size // 2] = value
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("name", "value", "code", "message"),
    [
        ("model.layers.3.mlp.up_proj.weight", np.nan, 2, "layers.3.mlp.up_proj.kernel hold NaN"),
        ("model.layers.0.mlp.up_proj.weight", -np.inf, 2, "layers.0.mlp.up_proj.kernel hold NaN"),
        # A flipped bit makes a number so large that no loss is one.
        ("model.norm.weight", 3e38, 1, "the largest weight is 3e+38, in norm.scale"),
    ],
)
def test_weights_at_fault_for_a_loss_are_named_before_compiling(
    name, value, code, message, tiny_model, write_config, tmp_path, capsys
):
    source = changed_model(tiny_model, tmp_path / "model", name, value)
    assert main(["--config", str(write_config(model__source=str(source))), *QUICK]) == code
    said = capsys.readouterr()
    assert message in said.err and str(source) in said.err
    assert "learning_rate" not in said.err and "Compiling" not in said.out


@pytest.mark.slow
def test_a_run_that_changes_no_weight_says_so(write_config, tmp_path, capsys):
    config = write_config(resolve__aggregator="cagrad", resolve__options={"c": 3e38})
    assert main(["--config", str(config), *QUICK]) == 0
    said = capsys.readouterr()
    assert "the resolved gradient of step 1 is zero; those of the languages are not" in said.err
    assert "no weight has changed in steps 1 to 2" in said.err
    assert said.err.count("Note: ") == 2
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(row)["grad_norm"] == 0 for row in rows if "loss" in json.loads(row))
    # One that was stopped between its last step and the evaluation of that trains no more.
    for file in ("results.json", "evaluation/step_00000002.json"):
        (tmp_path / "run" / file).unlink()
    assert main(["--config", str(config), *QUICK]) == 0
    said = capsys.readouterr()
    assert "Resuming from the checkpoint of step 2" in said.out and "Note: " not in said.err
