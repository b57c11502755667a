"""Adapters of experts against the peft library: logits, gradients, merging, and files both ways."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import tiny_models
from closeness import relative_error
from hf.adapter_cases import (
    TOKENS,
    TOLERANCE,
    WEIGHTS,
    Case,
    logits_and_gradients,
    tensor_of,
    with_adapters,
    with_random_adapters,
)
from jaxmoo.convert.models import open_model, to_hf
from jaxmoo.errors import CheckpointError
from jaxmoo.hf import load_adapter, save_adapter
from jaxmoo.hf.adapter import describe_adapter
from jaxmoo.models import LoRA, trainable_filter
from jaxmoo.models.lora import ADAPTERS
from tiny_models import by_logical_path

EXPERTS = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]


@pytest.fixture(scope="module")
def stacked(tmp_path_factory) -> Case:
    """Qwen3 with experts, whose stacked matrices are adapted, down_proj with a rank of its own."""
    settings = {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"down_proj": 2}}
    directory = tmp_path_factory.mktemp("qwen3_moe")
    settings |= {"target_modules": ["q_proj"], "target_parameters": EXPERTS}
    return Case(directory, "qwen3_moe", **settings)


def test_adapters_of_experts_are_pefts_in_logits_gradients_and_merged_weights(
    stacked: Case, tmp_path: Path
):
    """PEFT's gate and up share an A, whose gradient is the sum of those of ours."""
    lora = describe_adapter(stacked.adapter).lora
    ranks = {name: lora.rank_of(name) for name in lora.targets}
    assert ranks == {"q_proj": 4, "gate_proj": 4, "up_proj": 4, "down_proj": 2}
    graph, abstract, frozen = with_adapters(stacked.base, lora, range(3))
    params = load_adapter(stacked.adapter, abstract, lora)
    (our_logits, ours), (logits, theirs) = logits_and_gradients(stacked, (graph, frozen), params)
    assert relative_error(our_logits, logits) < TOLERANCE
    for layer, (inner, parts) in itertools.product(
        (0, 2), ((".base_layer", ["gate_proj", "up_proj"]), ("", ["down_proj"]))
    ):
        start = f"layers.{layer}.mlp.experts"
        a, b = (  # [parts, E, r, in] and [parts, E, out, r]
            np.array(
                [
                    [ours.pop(f"{start}.{e}.{p}.lora_{kind}.kernel").T for e in range(4)]
                    for p in parts
                ]
            )
            for kind in "AB"
        )
        name = f"base_model.model.model.{start}{inner}.lora_{{}}.default.weight"
        found_a, found_b = np.concatenate(a.sum(0)), np.concatenate(b, 1).transpose(1, 2, 0)
        assert relative_error(found_a, theirs[name.format("A")]) < TOLERANCE
        found_b = found_b.reshape(len(found_b), -1)
        assert relative_error(found_b, theirs[name.format("B")]) < TOLERANCE
    for path, gradient in ours.items():
        assert relative_error(gradient.T, theirs[tensor_of(path)]) < TOLERANCE, path

    to_hf(stacked.adapter, tmp_path / "merged", base=str(stacked.base))
    merged = stacked.reload(stacked.adapter).merge_and_unload()
    expected = tiny_models.in_files(merged, merged.state_dict())
    for name, value in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert relative_error(value, expected[name].numpy()) < 1e-6, name


def test_what_we_write_of_some_layers_experts_is_read_again_by_peft_and_here(
    stacked: Case, tmp_path: Path
):
    """Gate and up become one adapter, and again two, although their ranks differ."""
    import torch

    wider = {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 6}}
    lora = LoRA(2, 4, ("down_proj", "gate_proj", "up_proj"), **wider)
    model = with_random_adapters(stacked.base, lora, [2], segments=(0, 2))
    out = tmp_path / "out"
    save_adapter(model, out, base_model="org/base")
    found = json.loads((out / "adapter_config.json").read_text())
    assert found["target_modules"] == []
    assert found["target_parameters"] == [f"layers.2.{name}" for name in sorted(EXPERTS)]
    assert found["rank_pattern"] == {"gate_up_proj": 5}
    with torch.no_grad():
        logits = stacked.reload(out)(torch.tensor(TOKENS).long()).logits.numpy()
    assert relative_error(jax.jit(lambda x: model(x))(TOKENS), logits) < TOLERANCE
    described = describe_adapter(out)
    assert (described.layers, described.lora) == ((2,), lora)
    _, abstract, _ = with_adapters(stacked.base, lora, [2], (0, 2))
    again = by_logical_path(load_adapter(out, abstract, lora))
    for path, value in by_logical_path(nnx.state(model, trainable_filter(ADAPTERS))).items():
        np.testing.assert_array_equal(again[path], value, path)


@pytest.mark.slow
def test_adapters_of_single_experts_are_read_as_peft_reads_them(tmp_path: Path):
    """As it wrote them of linear maps, before transformers 5; Mixtral has names of its own."""
    import torch
    from peft import PeftModel

    tiny_models.save("mixtral", tmp_path / "base")
    rng, tensors = np.random.default_rng(0), {}
    for layer, expert in np.ndindex(3, 5):
        for name, size_in, size_out in (("w1", 48, 80), ("w3", 48, 80), ("w2", 80, 48)):
            start = (
                f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
            )
            for kind, shape in (("A", (2, size_in)), ("B", (size_out, 2))):
                value = rng.normal(0, 0.15, shape).astype(np.float32)
                tensors[f"{start}.lora_{kind}.weight"] = value
    out = tmp_path / "adapter"
    out.mkdir()
    save_file(tensors, out / WEIGHTS)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["w1", "w2", "w3"]}
    settings |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(tmp_path / "base")}
    (out / "adapter_config.json").write_text(json.dumps(settings))
    model = open_model(out).model
    found = jax.jit(lambda x: model(x))(TOKENS)
    theirs = PeftModel.from_pretrained(tiny_models.make("mixtral"), out)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS).long()).logits.numpy()
    assert relative_error(found, expected) < TOLERANCE


def test_new_adapters_of_experts_have_the_rank_that_they_say(stacked: Case, tmp_path: Path):
    """Nothing is told by a B of zeros, of which neither gate nor up uses any column."""
    out = shutil.copytree(stacked.adapter, tmp_path / "new")
    tensors = load_file(out / WEIGHTS)
    save_file({n: x * ("lora_A" in n) for n, x in tensors.items()}, out / WEIGHTS)
    lora = describe_adapter(out).lora
    assert (lora.rank_of("gate_proj"), lora.rank_of("up_proj")) == (4, 4)


def test_damaged_or_other_adapters_of_experts_are_refused(stacked: Case, tmp_path: Path):
    out = shutil.copytree(stacked.adapter, tmp_path / "copy")
    tensors = load_file(out / WEIGHTS)
    lora = describe_adapter(out).lora
    _, abstract, _ = with_adapters(stacked.base, lora, range(3))

    def refuse(match: str, tensors=tensors, **changes) -> None:
        config = json.loads((stacked.adapter / "adapter_config.json").read_text())
        (out / "adapter_config.json").write_text(json.dumps(config | changes))
        save_file(tensors, out / WEIGHTS)
        with pytest.raises(CheckpointError, match=match):
            load_adapter(out, abstract, lora)

    refuse(
        r"expected adapters on projections of layers.*; found .*experts\.base_layer",
        target_parameters=EXPERTS[:1],
    )
    refuse("target_parameters must be a list, found 'all'", target_parameters="all")
    refuse("axis 1 is a multiple of 3, every expert's rank", rank_pattern={"gate_up_proj": 3})
    router = "base_model.model.model.layers.0.mlp.gate.lora_{}.weight"
    more = {router.format(kind): np.ones((4, 4), np.float32) for kind in "AB"}
    refuse("no projection is called 'gate'.* routers get no adapters", tensors | more)
    few = {name: x for name, x in tensors.items() if "layers.2.mlp" not in name}
    refuse(r"missing: .*layers\.2\.mlp\.experts\.0\.", few)
