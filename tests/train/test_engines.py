"""Whole runs by both engines and on other meshes end with the same weights."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import tiny_models
from jaxmoo.commands.train import main
from jaxmoo.config import load_config
from train.test_run import QUIET, SHORT, largest_difference, trained, weights


@pytest.mark.slow
def test_other_meshes_and_the_stacked_engine_train_to_the_same_weights(
    write_config, eight_devices, tmp_path
):
    few = {"data__unseen": [], "data__max_held_out": 2, "data__batch_size": 8}
    few |= {"model__trainable": r"^layers\."}  # all of them: one loop to compile
    # AdamW divides by its size even a gradient that is nothing but rounding, down to eps.
    few |= {"resolve__aggregator": "cagrad", "train__steps": 3, "optimizer__eps": 1e-5}
    config = write_config(**QUIET | few)

    def command(name, *overrides):
        return "--config", str(config), f"output={tmp_path / name}", *overrides

    assert main(command("one device")) == 0
    assert main(command("stacked", "resolve.engine=stacked")) == 0
    meshes = {
        "languages x examples": [],
        "replicas x languages": ["mesh.data=2", "mesh.language=4"],
        "replicas x examples": ["mesh.data=2", "mesh.language=1"],
    }
    for name, overrides in meshes.items():
        assert eight_devices("jaxmoo.commands.train", "main", command(name, *overrides)) == 0, name
    reference = weights(tmp_path / "one device")
    before = load_file(Path(load_config(config).model.source) / "model.safetensors")
    assert largest_difference(reference, before) > 1e-2
    first = trained(tmp_path / "one device")
    for name in ("stacked", *meshes):
        assert largest_difference(weights(tmp_path / name), reference) < 1e-5, name
        for a, b in zip(first, trained(tmp_path / name), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), name


@pytest.mark.slow
def test_experts_and_their_router_are_trained_alike_by_both_engines(
    write_config, tiny_model, tmp_path
):
    """A resumed run too; transformers reads what is exported."""
    import torch
    from transformers import AutoModelForCausalLM

    from jaxmoo.hf import load_model

    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    sizes = {"vocab_size": 259, "num_hidden_layers": 2, "max_position_embeddings": 256}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    alike = {"mlp_only_layers": [], "use_sliding_window": False}  # one loop to compile
    tiny_models.save("qwen3_moe", base, **sizes, **tokens, **alike)
    few = {"model__source": str(base), "model__trainable": r"^layers\."}
    few |= {"train__steps": 2, "train__checkpoint_every": 1, "train__router_aux_loss_coef": 10}
    few |= {"resolve__aggregator": "cagrad", "resolve__blocks": "expert", "optimizer__eps": 1e-5}
    config = write_config(**SHORT | few)
    runs = [tmp_path / name for name in ("backward", "stacked", "resumed")]
    backward, stacked, resumed = runs

    def run(output, *overrides):
        assert main(["--config", str(config), f"output={output}", *overrides]) == 0

    run(backward)
    run(stacked, "resolve.engine=stacked")
    shutil.copytree(backward, resumed)
    shutil.rmtree(resumed / "checkpoints" / "2")
    shutil.rmtree(resumed / "export")
    (resumed / "results.json").unlink()
    run(resumed)

    before = load_file(base / "model.safetensors")
    changed = {name for name, x in weights(backward).items() if np.abs(x - before[name]).max() > 0}
    assert {f"model.layers.1.mlp.{name}.weight" for name in ("gate", "experts.3.up_proj")} < changed
    assert largest_difference(weights(stacked), weights(backward)) < 1e-5
    assert largest_difference(weights(resumed), weights(backward)) == 0
    losses = [[row["loss"] for row in trained(run)] for run in runs]
    assert losses[0] == losses[2]
    for a, b in zip(*losses[:2], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
        # The coefficient times at least about 2, the experts that a token reads.
        assert 19 < min(a.values()) < 40

    model = AutoModelForCausalLM.from_pretrained(backward / "export", dtype=torch.float32)
    ids = np.arange(40).reshape(2, 20) * 6
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    found = np.asarray(load_model(backward / "export")(ids))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
