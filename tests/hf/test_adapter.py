"""Adapters against the peft library: logits, gradients, merging, and its files both ways."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import tiny_models
from closeness import relative_error
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
from jaxmoo.hf.adapter import describe_adapter, peft_tensor
from jaxmoo.hf.source import resolve_source
from jaxmoo.models import (
    Decoder,
    DecoderConfig,
    LoRA,
    add_adapters,
    language_loss,
    merge_adapters,
    trainable_filter,
)
from jaxmoo.models.lora import ADAPTERS, PROJECTIONS
from tiny_models import by_logical_path, tokens_and_mask
from tiny_tokenizer import bytes_tokenizer, chat_tokenizer

TOLERANCE = 1e-5
WEIGHTS = "adapter_model.safetensors"
TOKENS, MASK = tokens_and_mask(tiny_models.SIZES["vocab_size"], (3, 23))


def with_adapters(base: Path, lora: LoRA, layers, segments=(0,)):
    """A model with adapters that are shapes only, in three parts."""
    model = load_model(base, segments=segments)
    add_adapters(model, lora, layers)
    return nnx.split(model, trainable_filter(ADAPTERS), ...)


class Case:
    """A base model, and adapters that peft made for it with random A and B.

    A, B and W are of one size, so that an adapter misplaced or misscaled shows.
    """

    def __init__(self, directory: Path, variant: str, **settings):
        import torch
        from peft import LoraConfig, get_peft_model

        self.variant = variant
        self.base, self.adapter = directory / "base", directory / "adapter"
        tiny_models.save(variant, self.base)
        model = get_peft_model(
            tiny_models.make(variant),
            LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings),
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    size = parameter if "magnitude" in name else torch.ones(())
                    parameter.copy_(0.15 * size * torch.randn_like(parameter))
        model.save_pretrained(self.adapter)
        self.model = model.eval()

    def reload(self, adapter: Path):
        """The base model with adapters from files, by peft."""
        from peft import PeftModel

        return PeftModel.from_pretrained(tiny_models.make(self.variant), adapter).eval()


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
    import torch

    case = request.getfixturevalue(name)
    graph, abstract, frozen = with_adapters(case.base, lora, layers, segments)
    params = load_adapter(case.adapter, abstract, lora)
    batch = {"tokens": jnp.asarray(TOKENS), "loss_mask": jnp.asarray(MASK)}

    @jax.jit
    def compute(params):
        gradients = jax.grad(lambda p: language_loss(nnx.merge(graph, p, frozen), batch))(params)
        return nnx.merge(graph, params, frozen)(batch["tokens"]), gradients

    our_logits, gradients = compute(params)

    ids, targets = torch.tensor(TOKENS).long(), torch.tensor(MASK)[:, 1:].flatten()
    case.model.zero_grad()
    logits = case.model(ids).logits
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    nll[targets].mean().backward()
    theirs = {n: p.grad.numpy() for n, p in case.model.named_parameters() if p.grad is not None}
    ours = by_logical_path(gradients)
    assert len(ours) == len(theirs) == (2 + lora.dora) * len(lora.targets) * len(layers)
    for path, gradient in ours.items():
        tensor = peft_tensor(path).name.removesuffix(".weight") + ".default.weight"
        assert relative_error(gradient.T, theirs[tensor]) < TOLERANCE, path

    assert relative_error(our_logits, logits.detach().numpy()) < TOLERANCE
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


def with_random_adapters(base: Path, lora: LoRA, layers=range(3), segments=(0,)):
    """A model with adapters that change something."""
    graph, abstract, frozen = with_adapters(base, lora, layers, segments)
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(abstract)
    values = [jnp.asarray(rng.normal(0, 0.15, x.shape).astype(np.float32)) for x in leaves]
    return nnx.merge(graph, jax.tree.unflatten(tree, values), frozen)


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


# --- Experts -----------------------------------------------------------------------------------

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
    import torch

    lora = describe_adapter(stacked.adapter).lora
    ranks = {name: lora.rank_of(name) for name in lora.targets}
    assert ranks == {"q_proj": 4, "gate_proj": 4, "up_proj": 4, "down_proj": 2}
    graph, abstract, frozen = with_adapters(stacked.base, lora, range(3))
    params = load_adapter(stacked.adapter, abstract, lora)
    batch = {"tokens": jnp.asarray(TOKENS), "loss_mask": jnp.asarray(MASK)}

    @jax.jit
    def compute(params):
        gradients = jax.grad(lambda p: language_loss(nnx.merge(graph, p, frozen), batch))(params)
        return nnx.merge(graph, params, frozen)(batch["tokens"]), gradients

    our_logits, gradients = compute(params)
    ids, targets = torch.tensor(TOKENS).long(), torch.tensor(MASK)[:, 1:].flatten()
    stacked.model.zero_grad()
    logits = stacked.model(ids).logits
    assert relative_error(our_logits, logits.detach().numpy()) < TOLERANCE
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    nll[targets].mean().backward()
    theirs = {n: p.grad.numpy() for n, p in stacked.model.named_parameters() if p.grad is not None}
    ours = by_logical_path(gradients)
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
        tensor = peft_tensor(path).name.removesuffix(".weight") + ".default.weight"
        assert relative_error(gradient.T, theirs[tensor]) < TOLERANCE, path

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

    refuse("expected adapters on projections of layers", target_parameters=EXPERTS[:1])
    refuse("target_parameters must be a list, found 'all'", target_parameters="all")
    refuse("multiple of 3, its rank, on axis 1", rank_pattern={"gate_up_proj": 3})
    router = "base_model.model.model.layers.0.mlp.gate.lora_{}.weight"
    more = {router.format(kind): np.ones((4, 4), np.float32) for kind in "AB"}
    refuse("no projection is called 'gate'.* routers get no adapters", tensors | more)
    few = {name: x for name, x in tensors.items() if "layers.2.mlp" not in name}
    refuse(r"missing: .*layers\.2\.mlp\.experts\.0\.", few)


# --- Bad input ---------------------------------------------------------------------------------


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
