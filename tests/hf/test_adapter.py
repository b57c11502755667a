"""Adapters against the peft library: logits, gradients, merging, and its files both ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

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
from jaxmoo.convert.describe import describe
from jaxmoo.convert.kinds import kind_of, source_of
from jaxmoo.convert.models import open_model, to_hf
from jaxmoo.errors import CheckpointError
from jaxmoo.hf import (
    ModelCard,
    load_adapter,
    load_model,
    load_tokenizer,
    save_adapter,
    save_model,
)
from jaxmoo.hf.source import resolve_source
from jaxmoo.models import (
    Decoder,
    DecoderConfig,
    LoRA,
    add_adapters,
    merge_adapters,
)
from jaxmoo.models.lora import PROJECTIONS
from tiny_tokenizer import bytes_tokenizer, chat_tokenizer


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory) -> Case:
    """Qwen2 (biases on q, k and v, tied head), adapters on all projections."""
    directory = tmp_path_factory.mktemp("qwen2")
    return Case(directory, "qwen2", r=4, lora_alpha=8, target_modules="all-linear")


@pytest.fixture(scope="module")
def somewhere(tmp_path_factory) -> Case:
    """Llama, adapters on some projections of the last two layers, scaled by alpha / sqrt(rank).

    One projection has a rank of its own, and one an alpha.
    """
    return Case(
        tmp_path_factory.mktemp("llama"),
        "llama",
        r=4,
        lora_alpha=6,
        rank_pattern={r".*[12]\.mlp\.down_proj": 2},
        alpha_pattern={"q_proj": 3},
        use_rslora=True,
        target_modules=["q_proj", "o_proj", "down_proj"],
        layers_to_transform=[1, 2],
        layers_pattern="layers",
    )


@pytest.fixture(scope="module")
def decomposed(tmp_path_factory) -> Case:
    """Qwen2, with magnitudes (DoRA) on projections with and without a bias."""
    directory = tmp_path_factory.mktemp("dora")
    targets = ["k_proj", "o_proj", "up_proj"]
    return Case(directory, "qwen2", r=4, lora_alpha=8, use_dora=True, target_modules=targets)


ALL = LoRA(rank=4, alpha=8)
SOME = LoRA(
    rank=4,
    alpha=6,
    targets=("q_proj", "o_proj", "down_proj"),
    rslora=True,
    rank_pattern={"down_proj": 2},
    alpha_pattern={"q_proj": 3},
)
DORA = LoRA(rank=4, alpha=8, targets=("k_proj", "o_proj", "up_proj"), dora=True)
CASES = [
    ("everywhere", ALL, range(3), (0, 2)),
    ("somewhere", SOME, [1, 2], (0, 1)),
    ("decomposed", DORA, range(3), (0,)),
]


@pytest.mark.parametrize(("name", "lora", "layers", "segments"), CASES)
def test_logits_gradients_and_merged_weights_equal_pefts(
    name, lora, layers, segments, request, tmp_path: Path
):
    case = request.getfixturevalue(name)
    graph, abstract, frozen = with_adapters(case.base, lora, layers, segments)
    params = load_adapter(case.adapter, abstract, lora)
    (our_logits, ours), (logits, theirs) = logits_and_gradients(case, (graph, frozen), params)
    assert len(ours) == len(theirs) == (2 + lora.dora) * len(lora.targets) * len(layers)
    for path, gradient in ours.items():
        assert relative_error(gradient.T, theirs[tensor_of(path)]) < TOLERANCE, path

    assert relative_error(our_logits, logits) < TOLERANCE
    model = nnx.merge(graph, params, frozen)
    merge_adapters(model)
    save_model(model, tmp_path / "merged", source=case.base)
    expected = case.reload(case.adapter).merge_and_unload().state_dict()
    found, before = (load_file(d / "model.safetensors") for d in (tmp_path / "merged", case.base))
    assert found.keys() == before.keys()
    adapted = {
        f"model.layers.{i}.{'mlp' if name in PROJECTIONS[4:] else 'self_attn'}.{name}.weight"
        for i in layers
        for name in lora.targets
    }
    for tensor, value in found.items():
        if tensor in adapted:
            assert relative_error(value, expected[tensor].numpy()) < 1e-6, tensor
            assert relative_error(value, before[tensor]) > 0.01, tensor
        else:
            np.testing.assert_array_equal(value, before[tensor], tensor)


@pytest.mark.parametrize(("name", "lora", "layers", "segments"), CASES)
def test_what_we_write_peft_loads_with_equal_logits(
    name, lora, layers, segments, request, tmp_path: Path
):
    import torch

    case = request.getfixturevalue(name)
    graph, abstract, frozen = with_adapters(case.base, lora, layers, segments)
    model = nnx.merge(graph, load_adapter(case.adapter, abstract, lora), frozen)
    out = tmp_path / "out"
    save_adapter(model, out, base_model="org/base", card=ModelCard("a", library="peft"))
    theirs, ours = load_file(case.adapter / WEIGHTS), load_file(out / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for tensor in ours:
        np.testing.assert_array_equal(ours[tensor], theirs[tensor], tensor)
    with torch.no_grad():
        expected = case.model(torch.tensor(TOKENS).long()).logits.numpy()
        found = case.reload(out)(torch.tensor(TOKENS).long()).logits.numpy()
    assert relative_error(found, expected) < 1e-6
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert set(config["target_modules"]) == set(lora.targets)
    assert (config["r"], config["lora_alpha"]) == (lora.rank, lora.alpha)
    assert "library_name: peft" in (out / "README.md").read_text()
    with pytest.raises(CheckpointError, match="not an empty directory"):
        save_adapter(model, out, base_model="org/base")


@pytest.mark.parametrize("name", ["everywhere", "somewhere", "decomposed"])
def test_a_directory_of_adapters_is_the_model_they_belong_to(name, request, tmp_path: Path):
    case = request.getfixturevalue(name)
    named = tmp_path / "adapter"
    shutil.copytree(case.adapter, named)
    config = json.loads((named / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(case.base)
    (named / "adapter_config.json").write_text(json.dumps(config))
    assert kind_of(named) == "adapter" and source_of(named) == case.base
    to_hf(named, tmp_path / "merged")
    expected = case.reload(case.adapter).merge_and_unload().state_dict()
    for tensor, value in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert relative_error(value, expected[tensor].numpy()) < 1e-6, tensor
    told = describe(named)
    assert "rank  4" in told and ("DoRA" in told) == (name == "decomposed")
    assert ("down_proj 2, scale 4.2" in told) == (name == "somewhere")


def test_a_tokenizer_beside_adapters_goes_with_the_merged_model(everywhere: Case, tmp_path: Path):
    base = tmp_path / "base"
    tiny_models.save("qwen2", base, vocab_size=260)
    chat_tokenizer("the base's {{ messages }}").save_pretrained(base)
    path = shutil.copytree(everywhere.adapter, tmp_path / "adapter")
    to_hf(path, tmp_path / "plain", base=str(base))
    assert len(load_tokenizer(tmp_path / "plain")) == 259
    bytes_tokenizer(["<s>"], chat_template="their {{ messages }}").save_pretrained(path)
    to_hf(path, tmp_path / "merged", base=str(base))
    merged = load_tokenizer(tmp_path / "merged")
    assert (len(merged), merged.chat_template) == (257, "their {{ messages }}")
    bytes_tokenizer(list("äöüß☃")).save_pretrained(path)
    with pytest.raises(CheckpointError, match="adapter do not belong together"):
        to_hf(path, tmp_path / "larger", base=str(base))


def test_adapters_that_do_not_tell_their_model_need_a_base(somewhere: Case, tmp_path: Path):
    path = tmp_path / "adapter"
    shutil.copytree(somewhere.adapter, path)
    config = json.loads((path / "adapter_config.json").read_text())

    def write(**changes):
        (path / "adapter_config.json").write_text(json.dumps(config | changes))

    write(base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match=r"does not say which model .* --base"):
        open_model(path)
    assert open_model(path, base=str(somewhere.base)).source == somewhere.base
    write(base_model_name_or_path="/nowhere/model")
    with pytest.raises(CheckpointError, match="'/nowhere/model', which is not to be had"):
        open_model(path)
    with pytest.raises(CheckpointError, match=r"this directory in lora\.adapter"):
        resolve_source(str(path))
    with pytest.raises(CheckpointError, match="a step or base was given"):
        open_model(path, step=1)


@pytest.mark.parametrize(
    "variant",
    [
        *("apertus", "cohere2", "gemma2", "gemma3_text", "granite", "mixtral", "olmo2", "phi3"),
        *("qwen3_moe", "smollm3"),
    ],
)
def test_every_familys_adapters_are_loaded_by_peft(variant, tmp_path: Path):
    """Also where a family keeps several projections in one matrix, and ranks and alphas differ.

    Of mixtures, experts are adapted, but not their routers, nor the MLP of layers without experts.
    """
    from peft import PeftModel

    tiny_models.save(variant, tmp_path / "base")
    lora = LoRA(rank=4, alpha=8, rank_pattern={"k_proj": 2}, alpha_pattern={"up_proj": 6})
    model = with_random_adapters(tmp_path / "base", lora)
    save_adapter(model, tmp_path / "adapter", base_model="org/base")
    theirs = PeftModel.from_pretrained(tiny_models.make(variant), tmp_path / "adapter")
    merged = theirs.merge_and_unload()
    expected = tiny_models.in_files(merged, merged.state_dict())
    merge_adapters(model)
    save_model(model, tmp_path / "merged", source=tmp_path / "base")
    for name, value in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert relative_error(value, expected[name].numpy()) < 1e-6, name
    plain = load_file(tmp_path / "base" / "model.safetensors")
    changed = next(name for name in plain if "layers.0.self_attn.o_proj" in name)
    assert relative_error(expected[changed].numpy(), plain[changed]) > 0.1


def test_adapters_of_another_kind_are_refused(everywhere: Case, tmp_path: Path):
    _, abstract, _ = with_adapters(everywhere.base, ALL, range(3))
    config = json.loads((everywhere.adapter / "adapter_config.json").read_text())

    def refuse(match: str, lora: LoRA = ALL, **changes) -> None:
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        shutil.copytree(everywhere.adapter, tmp_path / "other")
        (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=match):
            load_adapter(tmp_path / "other", abstract, lora)

    refuse("peft_type is 'IA3'", peft_type="IA3")
    refuse("lora_bias is set; bias is 'all'", lora_bias=True, bias="all")
    refuse("'pissa' changes the base model", init_lora_weights="pissa")
    refuse(r"scale of 0.75 on q_proj.* set lora\.alpha=3", alpha_pattern={"q_proj": 3})
    refuse("alpha_pattern must be an object, found 3", alpha_pattern=3)
    refuse("no regular expression", rank_pattern={"(": 3})
    refuse(
        "adapters of q_proj have 4 in one layer and 2 in another",
        rank_pattern={r".*1\.self_attn\.q_proj": 2},
    )
    refuse("rank 4 and alpha 8 on q_proj, this run's are to have rank 2", LoRA(rank=2, alpha=8))
    refuse(r"set lora\.alpha=8", LoRA(rank=4, alpha=16))
    refuse(r"set lora\.alpha=8 and lora\.rslora=true", use_rslora=True)
    refuse("rank None", r=None)
    for alpha in (float("nan"), float("inf"), 0, -8, True, "8", [8], None):
        refuse(r"have rank 4 and alpha .* must be a number above 0", lora_alpha=alpha)
    for rank in (True, 4.0, "4", 0):
        refuse("must be an integer of at least 1, found", r=rank)
    refuse("use_rslora must be true or false, found 'false'", use_rslora="false")
    refuse("use_dora must be true or false, found 1", use_dora=1)

    refuse(r"have magnitudes \(DoRA\): set lora\.dora=true", use_dora=True)
    _, abstract, _ = with_adapters(everywhere.base, LoRA(4, 8, dora=True), range(3))
    refuse(r"missing: .*lora_magnitude_vector", LoRA(4, 8, dora=True), use_dora=True)
    refuse(r"have no magnitudes \(DoRA\): set lora\.dora=false", LoRA(4, 8, dora=True))


def test_adapters_of_a_part_of_a_larger_model_are_refused(tmp_path: Path):
    """PEFT would look for them under other names."""
    config = {"text_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}}
    model = Decoder.abstract(DecoderConfig.from_hf({"model_type": "gemma3", **config}))
    add_adapters(model, SOME, [0])
    with pytest.raises(CheckpointError, match=r"within a larger one \(gemma3\).* Merge them"):
        save_adapter(model, tmp_path / "adapter", base_model="org/base")


def test_adapters_on_other_projections_are_all_named(everywhere: Case, somewhere: Case):
    _, abstract, _ = with_adapters(everywhere.base, SOME, range(3))
    with pytest.raises(CheckpointError, match=r"missing: .*layers\.0\.self_attn\.q_proj") as error:
        load_adapter(somewhere.adapter, abstract, SOME)
    assert "down_proj, o_proj, q_proj of the layers [1, 2]" in str(error.value)
    some = LoRA(rank=4, alpha=8, targets=SOME.targets)
    _, abstract, _ = with_adapters(everywhere.base, some, range(3))
    with pytest.raises(CheckpointError, match=r"not adapted by this run: .*k_proj"):
        load_adapter(everywhere.adapter, abstract, some)


def test_damaged_adapters_are_refused(everywhere: Case, tmp_path: Path):
    _, abstract, _ = with_adapters(everywhere.base, ALL, range(3))
    copy = shutil.copytree(everywhere.adapter, tmp_path / "copy")
    weights = load_file(copy / WEIGHTS)
    name = next(iter(weights))
    save_file({**weights, name: weights[name][:-1]}, copy / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"{name}: expected shape .*, found"):
        load_adapter(copy, abstract, ALL)
    for dtype in (np.int32, np.bool_, np.uint8):
        save_file({**weights, name: weights[name].astype(dtype)}, copy / WEIGHTS)
        with pytest.raises(CheckpointError, match=rf"{name} has dtype .*; supported: F32"):
            load_adapter(copy, abstract, ALL)
    for value in (np.nan, np.inf):
        save_file({**weights, name: np.full_like(weights[name], value)}, copy / WEIGHTS)
        with pytest.raises(CheckpointError, match=f"{name} holds values that are not finite"):
            load_adapter(copy, abstract, ALL)
    data = (everywhere.adapter / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} cannot be read"):
        load_adapter(copy, abstract, ALL)
    (copy / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="save the adapters as safetensors"):
        load_adapter(copy, abstract, ALL)
    (copy / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_adapter(copy, abstract, ALL)


def test_a_model_with_adapters_is_not_saved_without_them(everywhere: Case, tmp_path: Path):
    graph, abstract, frozen = with_adapters(everywhere.base, ALL, range(3))
    model = nnx.merge(graph, load_adapter(everywhere.adapter, abstract, ALL), frozen)
    with pytest.raises(CheckpointError, match="has no Hugging Face name"):
        save_model(model, tmp_path / "out", source=everywhere.base)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="no adapters"):
        save_adapter(load_model(everywhere.base), tmp_path / "out", base_model="org/base")
